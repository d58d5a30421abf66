"""A clock that counts: how long a call's launches take at least, with no GPU.

``python -m refine_kernels.inspect --clock`` compiles what a call launches, reads the machine code, and divides what
has to be done by what a chip does in a second. README.md of ``delta_rule`` shows its tables;
``docs/counted_clock.md`` tells how a bound is made and what it cannot see. Every number is *counted*, none is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from refine_kernels import inspect, sass
from refine_kernels.chips import Chip
from refine_kernels.launches import KernelVariant, Launch, in_order


class Speed(NamedTuple):
    """What a chip does, from its maker's data sheets."""

    gigahertz: float
    terabytes: float  # of memory, per second
    products: int  # multiply-adds of 16-bit numbers that one scheduler's tensor core does in a cycle
    shared: int  # bytes of shared memory of a multiprocessor
    warps: int  # that a multiprocessor holds
    doubles: int  # cycles of a float64 instruction


SPEEDS = {
    "sm_80": Speed(1.41, 2.04, 256, 164 << 10, 64, 2),
    "sm_86": Speed(1.74, 0.70, 128, 100 << 10, 48, 64),
    "sm_89": Speed(2.52, 0.86, 128, 100 << 10, 48, 64),
    "sm_90": Speed(1.755, 3.35, 512, 228 << 10, 64, 2),
    "sm_120": Speed(2.41, 1.79, 64, 100 << 10, 48, 64),
}
# Cycles for which an instruction of one warp occupies its scheduler's share of a pipe
PIPE_CYCLES = {"fma": 1, "imad": 2, "integer": 2, "special": 8, "memory": 4}
SCHEDULERS = 4
REGISTERS = 65_536
ASSUMPTIONS = """\
Counted, not measured: a lower bound of each launch, the largest of four times, and their sum.
  issue    one instruction a cycle and scheduler; every warp executes its loops as often as the shape says
  pipes    cycles an instruction occupies its pipe: float32 1, integer and IMAD 2, memory 4, special functions 8
  tensor   products at the tensor cores' peak
  bytes    each tensor of a launch moves once, at the memory's peak
Programs spread evenly over multiprocessors. Not seen: latency (a chain of dependent products waits for each), bank
conflicts, caches, launch gaps (each launch costs a microsecond or more beside), what is read twice from memory."""


@dataclass(frozen=True)
class Bound:
    """The least time of one launch, in microseconds."""

    kernel: str
    serial: bool  # goes along a sequence
    programs: int
    waves: int  # rounds of programs that a chip takes one after another
    config: str  # how it is cut
    turn: sass.Code  # of the largest loop, one turn of one warp
    total: sass.Code  # of one warp
    issue: float
    pipes: float
    tensor: float
    moved: float  # bytes
    nbytes: int
    certain: bool = True  # whether the loops found are those told of

    @property
    def microseconds(self) -> float:
        return max(self.issue, self.pipes, self.tensor, self.moved)


def bounds(
    run: Callable[[], Any], turns: Callable[[str, dict], tuple[list, bool, float]], arch: str
) -> list[Bound]:
    """The bound of every launch of ``run`` on a chip.

    ``turns(kernel, arguments)`` gives the turns of its outermost loops (:func:`sass.count`), whether it goes along
    a sequence, and the share of programs that have work. Of what an autotuner chooses from, the least bound counts.
    """
    launches = in_order(run, Chip(arch, inspect.ARCHS[arch].multiprocessors))
    return [_bound(launch, turns, arch) for launch in launches]


def _bound(launch: Launch, turns, arch: str) -> Bound:
    speed = SPEEDS[arch]
    moved = launch.nbytes / speed.terabytes / 1e6
    if not launch.variants:
        empty = sass.Code()
        return Bound(launch.kernel, False, 0, 0, "", empty, empty, 0, 0, 0, moved, launch.nbytes)
    found = []
    for variant, programs, arguments in zip(launch.variants, launch.programs, launch.arguments):
        compiled = _compiled(variant, arch)
        if compiled is None:
            continue
        told, serial, share = turns(launch.kernel, arguments)
        code, turn = sass.count(compiled.loops, told)
        issue, pipes, tensor = _times(code, programs * share, variant.num_warps, arch)
        held = max(resident(compiled, variant.num_warps, speed), 1)
        waves = math.ceil(programs * share / (held * inspect.ARCHS[arch].multiprocessors))
        config = f"{variant.num_warps} warps"
        certain = sass.matches(compiled.loops, told)
        found.append(
            Bound(
                launch.kernel,
                serial,
                programs,
                waves,
                config,
                turn,
                code,
                issue,
                pipes,
                tensor,
                moved,
                launch.nbytes,
                certain,
            )
        )
    if not found:
        raise ValueError(f"{launch.kernel}: no way to launch it fits {arch}")
    return min(found, key=lambda bound: (not bound.certain, bound.microseconds, bound.issue))


def _times(code: sass.Code, programs: float, warps: int, arch: str) -> tuple[float, float, float]:
    """Microseconds of issue, of the busiest pipe and of the tensor cores."""
    speed = SPEEDS[arch]
    each = math.ceil(programs / inspect.ARCHS[arch].multiprocessors)  # programs of a multiprocessor
    turns = math.ceil(each * warps / SCHEDULERS)  # warps of a scheduler, one after another
    tensor = sum(
        n * rows * columns * depth * size / 2 / speed.products
        for (rows, columns, depth, size), n in code.products.items()
    )
    pipes = {name: n * PIPE_CYCLES.get(name, 0) for name, n in code.pipes.items()}
    pipes["fma"] = pipes.get("fma", 0) + pipes.pop("imad", 0)  # IMAD goes there, at half the rate
    pipes["fp64"] = code.pipes.get("fp64", 0) * speed.doubles
    microsecond = speed.gigahertz * 1e3
    return tuple(turns * x / microsecond for x in (code.instructions, max(pipes.values()), tensor))


@dataclass(frozen=True)
class Compiled:
    """A kernel's loops in machine code, its registers a thread, and its shared memory in bytes a program."""

    loops: sass.Loop
    registers: int
    shared: int


_kept: dict[tuple, Compiled | None] = {}


def _compiled(variant: KernelVariant, arch: str) -> Compiled | None:
    """``None`` where it does not compile or fit, as an autotuner passes over it."""
    key = (arch, *variant.key)
    if key not in _kept:
        try:
            text, registers, shared = inspect.disassemble(variant, inspect.ARCHS[arch])
        except Exception:
            text, registers, shared = "", 0, 1 << 30
        fits = shared <= inspect.ARCHS[arch].shared_limit
        _kept[key] = Compiled(sass.read(text), registers, shared) if fits else None
    return _kept[key]


def resident(compiled: Compiled, warps: int, speed: Speed) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = -(-compiled.registers // 8) * 8 * 32 * warps
    return min(REGISTERS // registers, speed.shared // (compiled.shared + 1024), speed.warps // warps, 32)


def table(label: str, found: list[Bound]) -> str:
    """Text: a line for each launch, then serial and parallel sums. A kernel marked ``?`` has other loops than it is
    told to have: its instructions are a guess."""
    head = f"{label:<30} {'':>6} {'programs':>8} {'waves':>5}"
    parts = f"{'a turn':>6} {'tensor':>6} {'int':>5} {'float':>5} {'memory':>6} {'bars':>4} {'waits':>5}"
    times = f"{'issue':>7} {'pipes':>7} {'tensor':>7} {'bytes':>7} {'bound us':>8}"
    lines = [f"{head} | {parts} | {times}"]
    for b in found:
        pipes = b.turn.pipes
        counts = (
            b.turn.instructions,
            pipes["tensor"],
            pipes["integer"] + pipes["imad"],
            pipes["fma"],
            pipes["memory"],
        )
        name = b.kernel[:29] + ("" if b.certain else "?")
        head = f"{name:<30} {'serial' if b.serial else '':>6} {b.programs:>8} {b.waves:>5}"
        parts = "{:>6.0f} {:>6.0f} {:>5.0f} {:>5.0f} {:>6.0f}".format(*counts)
        parts += f" {b.turn.barriers:>4.0f} {b.turn.waits:>5.0f}"
        times = f"{b.issue:>7.1f} {b.pipes:>7.1f} {b.tensor:>7.1f} {b.moved:>7.1f} {b.microseconds:>8.1f}"
        lines.append(f"{head} | {parts} | {times}")
    lines.append(
        f"{label}: serial {serial(found):.1f} + parallel {total(found) - serial(found):.1f} = {total(found):.1f} "
        f"us counted, {sum(b.nbytes for b in found) / 1e9:.2f} GB"
    )
    return "\n".join(lines)


def total(found: list[Bound]) -> float:
    """The bounds of all launches one after another, in microseconds."""
    return sum(bound.microseconds for bound in found)


def serial(found: list[Bound]) -> float:
    """Those of launches that go along a sequence, in microseconds."""
    return sum(bound.microseconds for bound in found if bound.serial)


def report(
    arch: str, shape: tuple[int, int, int, int], value_heads: int, gated: bool, peer: str | None
) -> Iterator[str]:
    """Tables of forward, forward for training and backward in bfloat16 at ``shape`` = (rows, tokens, heads, head
    size), ours and then the peer's, and the ratios between them."""
    from refine_kernels import peers
    from refine_kernels.delta_rule import variants

    rows, tokens, heads, size = shape
    call = (rows, tokens, heads, value_heads, size, size, torch.bfloat16, gated)
    names = ("forward", "training forward", "backward")
    yield ASSUMPTIONS
    ours = []
    for name, run in zip(names, variants.clock_call(*call)):
        ours.append(bounds(run, variants.turns, arch))
        yield table(f"ours, {name}", ours[-1])
    if peer is None:
        return
    theirs = []
    with peers.a_gpu(inspect.ARCHS[arch]):
        for name, run in zip((names[0], names[2]), peers.fla_call(*call)[::2]):
            theirs.append(bounds(run, peers.fla_turns, arch))
            yield table(f"{peer}, {name}", theirs[-1])
    for name, found, other in zip(names, ours, (theirs[0], *theirs)):
        yield f"{name}: {total(found) / total(other):.2f} of {peer}'s counted time"
