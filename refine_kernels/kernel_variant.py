"""One kernel at one configuration that can be chosen: what ``python -m refine_kernels.inspect`` compiles.

Every op with Triton kernels has a file ``variants.py`` whose ``kernel_variants()`` yields one of these for
each configuration its launcher can choose, made from the same choosing function that the launcher calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class KernelVariant:
    """What the compiler must know to build a kernel without tensors or a GPU.

    Attributes:
        name: op, kernel and configuration, as the report prints it: ``"delta_rule.scan K128 V128 bf16"``.
        kernel: the ``triton.jit`` function.
        signature: argument name -> Triton type: ``"*bf16"``, ``"*fp32"``, ``"i32"``, ``"fp32"``; the name of a
            ``tl.constexpr`` argument maps to ``"constexpr"``.
        constants: constexpr argument name -> value.
        num_warps: warps per program.
        num_stages: software pipeline depth.
        divisible_by_16: argument names that the launcher guarantees to be multiples of 16 (pointers and
            strides), as Triton's own launcher would specialise them.
        spill_budget: bytes per thread that may spill to local memory on an NVIDIA target.
        spill_free: the chips, of those that inspect knows, where nothing may spill whatever the budget.
        tensor_core: whether the kernel must contain tensor-core instructions.
        archs: the chips that it can be chosen on, of those that inspect knows; empty: all.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible_by_16: frozenset[str] = field(default_factory=frozenset)
    spill_budget: int = 0
    spill_free: frozenset[str] = frozenset()
    tensor_core: bool = False
    archs: frozenset[str] = frozenset()
