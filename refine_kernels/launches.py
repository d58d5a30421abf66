"""What launchers launch, written down instead of started: nothing about a kernel is told a second time by hand.

An op's ``variants.py`` yields a :class:`Call` for each way of using its launchers. :func:`recorded` makes that call
on tensors without memory and turns every launch into a :class:`KernelVariant`, typed and specialised as Triton does
it: constants, ``None`` and the integer 1 are compiled in, pointers and integers may be multiples of 16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from refine_kernels import chips

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class KernelVariant:
    """What the compiler must know to build a kernel without tensors or a GPU, and what is asked of the result.

    Attributes:
        name: op, kernel and configuration, as the report prints it: ``"delta_rule.scan K128 V128 bfloat16"``.
        kernel: the ``triton.jit`` function.
        signature: argument name -> Triton type: ``"*bf16"``, ``"*fp32"``, ``"i32"``, ``"fp32"``, ``"constexpr"``.
        constants: argument name -> value, of those that are ``"constexpr"``.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        divisible_by_16: names of pointers and integers that are multiples of 16.
        spill_budget: bytes per thread that may spill to local memory on an NVIDIA target.
        chip_budgets: chip -> bytes, where one of those that inspect knows is held to another budget.
        tensor_core: whether the kernel must contain tensor-core instructions.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    spill_budget: int = 0
    chip_budgets: dict[str, int] = field(default_factory=dict)
    tensor_core: bool = False

    @property
    def key(self) -> tuple:
        """What the compiler sees: variants of one key are one binary."""
        constants = tuple((name, str(value)) for name, value in self.constants.items())
        types = (tuple(self.signature.items()), tuple(sorted(self.divisible_by_16)))
        return self.kernel.__name__, types, constants, self.num_warps, self.num_stages


@dataclass(frozen=True)
class Call:
    """One way of using an op's launchers.

    Attributes:
        label: what is special about it, as names of variants show it.
        run: makes the call.
        demands: kernel name (without ``_kernel``) -> what is asked of it: fields of :class:`KernelVariant`.
    """

    label: str
    run: Callable[[], Any]
    demands: Callable[[str], dict[str, Any]]


def recorded(op: str, calls: Iterator[Call], chip: chips.Chip) -> list[KernelVariant]:
    """Every different kernel that the calls launch on ``chip``; a kernel that one call launches in several ways is
    numbered."""
    found: dict[tuple, KernelVariant] = {}
    for call in calls:
        launched: dict[str, list[tuple]] = {}

        def note(kernel, *arguments, grid, warmup, launched=launched, **options):
            variant = _specialised(kernel, arguments, options)
            same = launched.setdefault(kernel.__name__.removesuffix("_kernel"), [])
            if variant.key not in [other.key for other in same]:
                same.append(variant)

        with chips.assume(chip), mock.patch.object(JITFunction, "run", note):
            call.run()
        for kernel, variants in launched.items():
            for i, variant in enumerate(variants):
                number = f" ({i + 1})" if len(variants) > 1 else ""
                name = f"{op}.{kernel} {call.label}{number}"
                found.setdefault(variant.key, _named(variant, name, call.demands(kernel)))
    return list(found.values())


@dataclass(frozen=True)
class Launch:
    """One launch of a call, in its place among the others.

    Attributes:
        kernel: its name, without ``_kernel``; a PyTorch operation's name where ``variants`` is empty.
        variants: what may be launched there: one kernel, or a few of those that an autotuner chooses from, which
            differ in more than the loads they keep in flight.
        programs: of each of them.
        arguments: of each of them, by name.
        nbytes: of all its tensors, each counted once.
    """

    kernel: str
    variants: list[KernelVariant]
    programs: list[int]
    arguments: list[dict[str, Any]]
    nbytes: int


def in_order(run: Callable[[], Any], chip: chips.Chip) -> list[Launch]:
    """Every launch that ``run`` makes on ``chip``, and every operation of PyTorch between them that moves bytes."""
    found: list[Launch] = []
    among: list[Launch] = []  # where an autotuner runs all that it chooses from

    def note(kernel, *arguments, grid, warmup, **options):
        values = dict(zip(kernel.arg_names, arguments))
        values |= {name: value for name, value in options.items() if name in kernel.arg_names}
        variant = _specialised(kernel, arguments, options)
        tensors = {id(x): x.nbytes for x in values.values() if isinstance(x, torch.Tensor)}
        programs = math.prod(grid(values) if callable(grid) else grid)
        name = kernel.__name__.removesuffix("_kernel")
        found.append(Launch(name, [variant], [programs], [values], sum(tensors.values())))

    def choose(tuner, *arguments, **options):
        first = len(found)
        different = {(str(config.kwargs), config.num_warps): config for config in tuner.configs}
        for config in list(different.values())[:: max(len(different) // 4, 1)]:
            chosen = config.kwargs | {"num_warps": config.num_warps, "num_stages": config.num_stages}
            tuner.fn.run(*arguments, **options, **chosen)
        among[:], found[first:] = found[first:], []
        joined = [
            [x for one in among for x in getattr(one, name)] for name in ("variants", "programs", "arguments")
        ]
        found.append(Launch(among[0].kernel, *joined, among[0].nbytes))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if moved := _bytes_moved(function, arguments, result):
                found.append(Launch(f"torch.{function.overloadpacket.__name__}", [], [], [], moved))
            return result

    with (
        chips.assume(chip), mock.patch.object(JITFunction, "run", note),
        mock.patch.object(Autotuner, "run", choose), Operations(),
    ):  # fmt: skip
        run()
    return found


def _bytes_moved(function, arguments: tuple, result: Any) -> int:
    """Of an operation of PyTorch on tensors without memory: all it reads and writes; 0 for views and new memory."""
    name = function.overloadpacket.__name__
    returns = function._schema.returns
    if "empty" in name or any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
        return 0
    written = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.device.type == "meta"]
    only_written = name in ("zero_", "fill_", "zeros", "new_zeros", "zeros_like", "full", "ones")
    read = [] if only_written else [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in [*read, *written] if x.device.type == "meta")


def _named(variant: KernelVariant, name: str, demands: dict[str, Any]) -> KernelVariant:
    return KernelVariant(**(vars(variant) | {"name": name} | demands))


def _specialised(kernel: JITFunction, arguments: tuple, options: dict[str, Any]) -> KernelVariant:
    """As Triton's own launcher would compile this launch. Memory of a new tensor is a multiple of 16."""
    values = dict(zip(kernel.arg_names, arguments))
    values |= {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, constants, divisible = {}, {}, set()
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        whole = isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.add(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if whole and value % 16 == 0:
                divisible.add(name)
        else:
            signature[name] = "fp32"
    return KernelVariant(
        kernel.__name__, kernel, signature, constants, divisible_by_16=frozenset(divisible), **options
    )
