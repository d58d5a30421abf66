"""What stands in the machine code of an NVIDIA kernel: its loops, and how many instructions of which kind.

Read from what ``cuobjdump -sass`` prints. A loop is what a branch backwards jumps over; instructions of a loop
inside another belong to the inner one alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)

# The first part of an instruction's name -> the pipe that executes it. What is not listed is counted as "other".
_PIPES = {
    "fma": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD",
    "imad": "IMAD IMUL IDP",
    "integer": (
        "IADD3 IADD VIADD VIADDMNMX VIMNMX LEA LOP3 LOP PLOP3 SHF SHL SHR ISETP FSETP SEL FSEL FMNMX IMNMX PRMT "
        "P2R R2P SGXT BMSK F2FP MOV CS2R IABS HSETP2 HMNMX2 ISCADD PSETP FCHK"
    ),
    "special": "MUFU I2F F2I F2F I2FP F2IP FRND POPC FLO BREV",
    "fp64": "DADD DMUL DFMA DSETP DMMA",
    "memory": "LDG STG LDS STS LDSM STSM LDGSTS LDL STL LD ST ATOM ATOMG ATOMS RED SHFL UTMALDG UTMASTG LDC",
    "tensor": "HGMMA QGMMA IGMMA HMMA IMMA UTCHMMA UTCQMMA",
    "control": (
        "BRA BRX EXIT RET CALL BAR BSYNC BSSY WARPSYNC WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE SYNCS NOP NANOSLEEP "
        "ERRBAR CCTL CCTLL BMOV BREAK YIELD VOTE WARPGROUPSET ARRIVES S2R S2UR ELECT ACQBULK"
    ),
}
PIPES = (*_PIPES, "uniform", "other")
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}


@dataclass
class Code:
    """Instructions of one warp."""

    pipes: Counter = field(default_factory=Counter)  # pipe -> instructions
    products: Counter = field(default_factory=Counter)  # (rows of the warp, columns, depth, bytes a number)
    barriers: int = 0  # at which all warps of the program meet
    waits: int = 0  # for results of the tensor cores or for loads to arrive

    @property
    def instructions(self) -> int:
        return sum(self.pipes.values())

    def times(self, n: float) -> Code:
        return Code(
            Counter({name: n * count for name, count in self.pipes.items()}),
            Counter({shape: n * count for shape, count in self.products.items()}),
            n * self.barriers,
            n * self.waits,
        )

    def __add__(self, other: Code) -> Code:
        return Code(
            self.pipes + other.pipes,
            self.products + other.products,
            self.barriers + other.barriers,
            self.waits + other.waits,
        )


@dataclass
class Loop:
    """A loop and those inside it."""

    begin: int
    end: int
    body: Code = field(default_factory=Code)  # without the loops inside
    inner: list[Loop] = field(default_factory=list)

    @property
    def whole(self) -> Code:
        """One turn, the loops inside taken once."""
        return sum((loop.whole for loop in self.inner), self.body)


def read(text: str) -> Loop:
    """The code as a loop that runs once, with the real loops inside it in the order of their addresses."""
    lines = [(int(address, 16), name, rest) for address, name, rest in _LINE.findall(text)]
    if not lines:
        raise ValueError(f"no instructions in {text[:80]!r}")
    found: dict[int, int] = {}  # where a loop begins -> its last branch back
    for address, name, rest in lines:
        target = re.search(r"\b0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            begin = int(target[1], 16)
            found[begin] = max(found.get(begin, 0), address)
    root = Loop(0, lines[-1][0])
    for begin, end in sorted(found.items(), key=lambda loop: (loop[0], -loop[1])):
        innermost(root, begin, end).inner.append(Loop(begin, end))
    for address, name, rest in lines:
        _note(innermost(root, address, address).body, name, rest)
    return root


def innermost(loop: Loop, begin: int, end: int) -> Loop:
    """The innermost loop that holds these addresses."""
    for inner in loop.inner:
        if inner.begin <= begin and end <= inner.end:
            return innermost(inner, begin, end)
    return loop


def count(loop: Loop, turns: Sequence) -> tuple[Code, Code]:
    """``(everything that one warp executes, one turn of the largest loop)``.

    ``turns`` has for every outermost loop a number, or ``(number, turns of each loop inside it)``. A loop that is
    not told of is taken to turn once: a compiler may unroll a short loop, and :func:`matches` finds out.
    """
    total, largest = loop.body, Code()
    for inner, told in zip(loop.inner, [*turns, *[1] * len(loop.inner)]):
        times, inside = told if isinstance(told, tuple) else (told, 1)
        one, _ = count(inner, [inside] * len(inner.inner))
        total = total + one.times(times)
        if one.instructions > largest.instructions:
            largest = one
    return total, largest


def matches(loop: Loop, turns: Sequence) -> bool:
    """Whether the outermost loops are as many as are told of, and those inside them are told of; or there are none,
    as the compiler has unrolled them all."""
    if not loop.inner:
        return True
    told_of = all(isinstance(told, tuple) or not inner.inner for inner, told in zip(loop.inner, turns))
    return told_of and len(loop.inner) == len(turns)


def _note(code: Code, name: str, rest: str) -> None:
    first, _, _ = name.partition(".")
    pipe = _PIPE_OF.get(first)
    if pipe is None:
        pipe = "uniform" if first.startswith("U") or first in ("R2UR", "VOTEU", "REDUX") else "other"
    code.pipes[pipe] += 1
    if pipe == "tensor" and (shape := product_shape(name)) is not None:
        code.products[shape] += 1
    code.barriers += first == "BAR"
    code.waits += "DEPBAR.L" in name or "gsb0" in rest


def product_shape(name: str) -> tuple[int, int, int, int] | None:
    """``(rows that one warp has of it, columns, depth, bytes a number)`` of a tensor-core instruction's name;
    ``None`` where the name does not tell (Blackwell's tcgen05)."""
    size = 4 if "TF32" in name else 2
    if found := re.search(r"64x(\d+)x(\d+)", name):
        return 16, int(found[1]), int(found[2]), size
    if found := re.search(r"HMMA\.(16)(8)(\d+)", name):
        return int(found[1]), int(found[2]), int(found[3]), size
    return None
