"""What the compiler makes of every kernel: ``python -m refine_kernels.inspect``. No GPU is needed.

What is compiled is what the launchers launch, for every architecture: ``refine_kernels.<op>.variants`` calls them,
and :mod:`refine_kernels.launches` writes down what they do. One line each says how many registers a thread has, how
many bytes of registers the compiler spilled to memory, how much shared memory a program takes and which tensor-core
instruction was found. The exit status is 1 when a kernel does not compile, needs more shared memory than the chip
has, spills more than its stated budget on an NVIDIA chip, lacks the tensor-core instruction that it must have, or
has a Hopper product whose warps reach over its rows.

Registers and shared memory are read from the finished binary. Spilled bytes are those of all loads from and
stores to local memory in its machine code, each instruction counted once however often it runs: the sum of
ptxas' own "spill stores" and "spill loads". For AMD chips they are the scratch bytes of a thread.

*Reaching over*: a Hopper product takes its operands 64 rows a warpgroup (four warps). Where another product takes
its result, Triton lines all warps up along the rows; with eight warps and 64 rows there is nothing for the second
warpgroup to read. The one kernel that an H100 stopped with an illegal access had such products.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

from refine_kernels import launches
from refine_kernels.chips import Chip
from refine_kernels.launches import KernelVariant


@dataclass(frozen=True)
class Arch:
    """A chip to compile for."""

    name: str
    multiprocessors: int
    backend: str  # Triton's name of it: "cuda" or "hip"
    version: int | str
    warp_size: int
    shared_limit: int  # bytes of shared memory that one program may have
    tensor_core: str  # matches the instruction in the assembly, up to where its variants begin


ARCHS = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 108, "cuda", 80, 32, 166_912, r"mma\.sync"),  # A100
        Arch("sm_86", 84, "cuda", 86, 32, 101_376, r"mma\.sync"),  # A40, RTX 3090
        Arch("sm_89", 142, "cuda", 89, 32, 101_376, r"mma\.sync"),  # L40S, RTX 4090
        Arch("sm_90", 132, "cuda", 90, 32, 232_448, r"wgmma(?=\.mma_async)|mma\.sync"),  # H100
        Arch("sm_100", 148, "cuda", 100, 32, 232_448, r"tcgen05(?=\.mma)|mma\.sync"),  # B200
        Arch("sm_120", 170, "cuda", 120, 32, 101_376, r"mma\.sync"),  # RTX 5090
        Arch("gfx942", 304, "hip", "gfx942", 64, 65_536, r"mfma(?=_)"),  # MI300X
    )
}
_BYTES_OF_ACCESS = {"": 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}


@dataclass(frozen=True)
class Measured:
    """What the compiler made of one kernel."""

    registers: int  # of a thread
    spilled_bytes: int  # stored and loaded, of a thread
    shared_bytes: int  # of a program
    tensor_core: str  # the instruction found; several are joined by "+"; "" for none
    reaching_over: str = ""  # a Hopper product with more warps along its rows than it has rows for


@dataclass(frozen=True)
class Report:
    """One line of the table."""

    variant: str
    arch: str
    num_warps: int
    num_stages: int
    measured: Measured | None  # None where nothing could be compiled
    problems: tuple[str, ...]  # empty where all is well


# ---------------------------------------------------------------------------------------------------------
# Finding


def ops_with_kernels() -> list[str]:
    """The folders of ``refine_kernels`` that have a ``variants.py``."""
    return sorted(file.parent.name for file in Path(__file__).parent.glob("*/variants.py"))


@lru_cache
def variants_of(op: str, arch: str) -> list[KernelVariant]:
    """Every kernel that the launchers of ``refine_kernels/<op>`` launch on a chip."""
    calls = importlib.import_module(f"refine_kernels.{op}.variants").calls()
    return launches.recorded(op, calls, Chip(arch, ARCHS[arch].multiprocessors))


# ---------------------------------------------------------------------------------------------------------
# Compiling and judging


def inspect_variant(variant: KernelVariant, arch: Arch) -> Report:
    """Compile one variant for one chip and judge it."""
    try:
        measured = measure(variant, arch)
        problems = judge(variant, arch, measured)
    except Exception as error:  # whatever the compiler raises is that kernel's result
        measured = None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        problems = [" ".join(["does not compile:", type(error).__name__, *lines[:1], *lines[1:][-1:]])]
    return Report(variant.name, arch.name, variant.num_warps, variant.num_stages, measured, tuple(problems))


def compile_variant(variant: KernelVariant, arch: Arch):
    """Triton's compiled kernel of ``variant`` for ``arch``; whatever the compiler raises passes through."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = variant.kernel.arg_names
    if list(variant.signature) != names:
        raise ValueError(f"signature must be of {', '.join(names)}, got {', '.join(variant.signature)}")
    source = triton.compiler.ASTSource(
        fn=variant.kernel,
        signature=variant.signature,
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible_by_16},
    )
    target = GPUTarget(arch.backend, arch.version, arch.warp_size)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    with contextlib.redirect_stdout(io.StringIO()):  # a failing ptxas makes Triton print the whole assembly
        return triton.compile(source, target=target, options=options)


def measure(variant: KernelVariant, arch: Arch) -> Measured:
    """Compile ``variant`` for ``arch`` and read the result."""
    compiled = compile_variant(variant, arch)
    if arch.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        registers, spilled = read_amdgcn(assembly)
    else:
        assembly = compiled.asm["ptx"]
        registers, spilled = read_cubin(compiled.asm["cubin"])
    found = "+".join(sorted(set(re.findall(arch.tensor_core, assembly))))
    over = products_reaching_over(compiled.asm["ttgir"]) if arch.name == "sm_90" else []
    return Measured(registers, spilled, compiled.metadata.shared, found, ", ".join(over))


def judge(variant: KernelVariant, arch: Arch, measured: Measured) -> list[str]:
    """What is wrong with it, a sentence each."""
    problems = []
    if measured.shared_bytes > arch.shared_limit:
        problems.append(
            f"takes {measured.shared_bytes} bytes of shared memory where {arch.name} has {arch.shared_limit}"
        )
    budget = variant.chip_budgets.get(arch.name, variant.spill_budget)
    if arch.backend == "cuda" and measured.spilled_bytes > budget:
        problems.append(f"spills {measured.spilled_bytes} bytes, budget {budget}")
    if variant.tensor_core and not measured.tensor_core:
        problems.append("has no tensor-core instruction")
    if measured.reaching_over:
        problems.append(f"has products whose warps reach over their rows: {measured.reaching_over}")
    return problems


def products_reaching_over(ttgir: str) -> list[str]:
    """Results of Hopper products, as ``"64x32 by 8x1 warps"``, whose warps cover more rows than there are (16
    each), from Triton's intermediate code for the GPU."""
    warps = {
        name: (int(rows), int(columns))
        for name, rows, columns in re.findall(
            r"^(#\w+) = #ttg\.nvidia_mma<\{versionMajor = 3,.*?warpsPerCTA = \[(\d+), (\d+)\]",
            ttgir,
            flags=re.M,
        )
    }
    found = set()
    for result in re.findall(r"= ttng\.warp_group_dot .*-> tensor<([^>]*)>", ttgir):
        shape, layout = result.split(", ")
        rows, columns = (int(size) for size in shape.split("x")[:2])
        if layout in warps and 16 * warps[layout][0] > rows:
            found.add("{}x{} by {}x{} warps".format(rows, columns, *warps[layout]))
    return sorted(found)


def disassemble(variant: KernelVariant, arch: Arch) -> tuple[str, int, int]:
    """``(machine code, registers of a thread, shared memory of a program)`` on an NVIDIA chip."""
    compiled = compile_variant(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        registers, _ = read_resource_usage(_cuobjdump("-res-usage", path))
        return _cuobjdump("-sass", path), registers, compiled.metadata.shared


def read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from an NVIDIA binary that holds one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        registers, stack = read_resource_usage(_cuobjdump("-res-usage", path))
        return registers, read_local_accesses(_cuobjdump("-sass", path)) if stack else 0


def read_resource_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes of a thread, from what ``cuobjdump -res-usage`` prints."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text.strip()!r}")
    return int(found[1]), int(found[2])


def read_local_accesses(text: str) -> int:
    """Bytes stored to and loaded from local memory, from what ``cuobjdump -sass`` prints."""
    total = 0
    for suffixes in re.findall(r"\b(?:STL|LDL)((?:\.\w+)*) ", text):
        widths = [part for part in suffixes.split(".") if part in _BYTES_OF_ACCESS]
        total += _BYTES_OF_ACCESS[widths[-1] if widths else ""]
    return total


def read_amdgcn(text: str) -> tuple[int, int]:
    """Registers and scratch bytes of a thread, from AMD assembly that holds one kernel."""
    return tuple(
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
    )


def _cuobjdump(option: str, path: Path) -> str:
    """What the disassembler in Triton's own package prints."""
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------------------------------------------------
# The command


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 when every kernel is well, 1 when one is not, 2 when the command is not."""
    options = _parser().parse_args(arguments)
    try:
        if options.clock:
            return _clock(options)
        chosen = _choose(options)
    except ValueError as error:
        print(f"refine_kernels.inspect: {error}", file=sys.stderr)
        return 2

    width = max(len(variants_of(op, arch)[i].name) for op, i, arch in chosen)
    print(
        _columns(width, "variant", "arch", "warps", "stages", "regs", "spilled", "shared / limit", "tensor")
    )
    reports = []
    for report in _run(chosen, options.jobs):
        print(_line(width, report), flush=True)
        reports.append(report)
    failed = sum(bool(report.problems) for report in reports)
    print(f"{len(reports)} compiled, {failed} failed" if failed else f"{len(reports)} compiled, all well")
    if options.json:
        options.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refine_kernels.inspect", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"of {', '.join(ARCHS)}; default: all")
    parser.add_argument("--op", nargs="+", help="folders of refine_kernels; default: all with kernels")
    parser.add_argument(
        "--kernel", default="", metavar="SUBSTRING", help="only variants with this in the name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes to compile in")
    clock = parser.add_argument_group("the counted clock (docs/counted_clock.md)")
    clock.add_argument(
        "--clock", action="store_true", help="count the least time of the delta rule's launches"
    )
    clock.add_argument("--peer", choices=("fla",), help="and of this library's for the same call")
    clock.add_argument(
        "--shape", type=int, nargs=4, default=(1, 16384, 16, 128), metavar=("ROWS", "TOKENS", "HEADS", "SIZE")
    )
    clock.add_argument("--value-heads", type=int, metavar="N", help="a multiple of HEADS; default: HEADS")
    clock.add_argument("--gated", action="store_true", help="with decay")
    return parser


def _clock(options: argparse.Namespace) -> int:
    """Print the counted clock's tables, of the first chip asked for (by default sm_90)."""
    from refine_kernels import clock

    _check_compiler()
    arch = "sm_90" if options.arch == list(ARCHS) else options.arch[0]
    if arch not in clock.SPEEDS:
        raise ValueError(f"--clock knows {', '.join(clock.SPEEDS)}, got {arch}")
    heads = options.shape[2]
    value_heads = options.value_heads or heads
    if min(options.shape) < 1 or value_heads % heads:
        raise ValueError("--shape must be four positive numbers, --value-heads a multiple of the third")
    if options.peer and importlib.util.find_spec(options.peer) is None:
        raise ValueError(f"the package {options.peer} is not installed: pip install flash-linear-attention")
    for text in clock.report(arch, tuple(options.shape), value_heads, options.gated, options.peer):
        print(text, end="\n\n", flush=True)
    return 0


def _check_compiler() -> None:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("TRITON_INTERPRET=1 is set: interpreted kernels are never compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the package triton is not installed, and it is the compiler")


def _choose(options: argparse.Namespace) -> list[tuple[str, int, str]]:
    """(op, number of the variant, arch) of everything asked for; ``ValueError`` with a sentence if it cannot be."""
    _check_compiler()
    if unknown := [arch for arch in options.arch if arch not in ARCHS]:
        raise ValueError(f"--arch must be of {', '.join(ARCHS)}, got {', '.join(unknown)}")
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {options.jobs}")
    there = ops_with_kernels()
    if unknown := [op for op in options.op or () if op not in there]:
        raise ValueError(f"--op must be of {', '.join(there) or 'nothing yet'}, got {', '.join(unknown)}")
    chosen = [
        (op, i, arch)
        for op in options.op or there
        for arch in options.arch
        for i, variant in enumerate(variants_of(op, arch))
        if options.kernel in variant.name
    ]
    if not chosen:
        raise ValueError(f"--kernel {options.kernel!r} is in the name of no variant of {', '.join(there)}")
    return chosen


def _run(chosen: Iterable[tuple[str, int, str]], jobs: int) -> Iterator[Report]:
    """Reports in the order of ``chosen``, from this process or from ``jobs`` others."""
    if jobs == 1:
        yield from (_inspect(*one) for one in chosen)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        yield from pool.map(_inspect, *zip(*chosen))


def _inspect(op: str, i: int, arch: str) -> Report:
    """What a worker does: kernels cannot be sent to another process, their place in the list can."""
    return inspect_variant(variants_of(op, arch)[i], ARCHS[arch])


def _line(width: int, report: Report) -> str:
    """One report; what is wrong with it stands at the end."""
    if (m := report.measured) is None:
        found = ("-",) * 4
    else:
        shared = f"{m.shared_bytes} / {ARCHS[report.arch].shared_limit}"
        found = (m.registers, m.spilled_bytes, shared, m.tensor_core or "-")
    line = _columns(width, report.variant, report.arch, report.num_warps, report.num_stages, *found)
    return f"{line}  FAILED: {'; '.join(report.problems)}" if report.problems else line


def _columns(width: int, variant, arch, warps, stages, registers, spilled, shared, tensor) -> str:
    return (
        f"{variant:<{width}}  {arch:<6}  {warps:>5}  {stages:>6}  {registers:>4}  {spilled:>7}  "
        f"{shared:>16}  {tensor}"
    )


if __name__ == "__main__":
    sys.exit(main())
