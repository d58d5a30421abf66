"""Every kernel compiles for every chip within its budget; and the tool that says so would notice if not."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import pytest
import triton
import triton.language as tl

from refine_kernels import inspect
from refine_kernels.inspect import ARCHS, Measured, inspect_variant, judge
from refine_kernels.kernel_variant import KernelVariant


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def hungry(x, y, N: tl.constexpr):
    """Holds two blocks in registers at once: the barriers keep the loads apart from the store."""
    i = tl.arange(0, N)
    b_x = tl.load(x + i)
    tl.debug_barrier()
    b_y = tl.load(y + i)
    tl.debug_barrier()
    tl.store(y + i, b_x * b_y)


@triton.jit
def broken(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), undefined_name)  # noqa: F821


def product_variant(n=64, **changes):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "N": "constexpr"}
    settings = {"tensor_core": True, "divisible_by_16": frozenset("abc")}
    return KernelVariant(f"toy.product {n}", product, signature, {"N": n}, **(settings | changes))


def hungry_variant(n=8192, **changes):
    signature = {"x": "*fp32", "y": "*fp32", "N": "constexpr"}
    return KernelVariant(f"toy.hungry {n}", hungry, signature, {"N": n}, num_warps=1, **changes)


TOYS = [product_variant(), hungry_variant()]

# --- reading what the tools print -------------------------------------------------------------------------


def test_registers_and_stack():
    text = " Function f:\n  REG:255 STACK:280 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert inspect.read_resource_usage(text) == (255, 280)
    with pytest.raises(ValueError, match="no resource usage"):
        inspect.read_resource_usage("cuobjdump info : nothing here")


@pytest.mark.parametrize(
    "line, bytes_",
    [
        ("/*0010*/  STL [R1+0x8], R4 ;", 4),
        ("/*0010*/  @!P0 STL.64 [R1], R4 ;", 8),
        ("/*0010*/  LDL.LU.128 R8, [R1+0x10] ;", 16),
        ("/*0010*/  LDL.LU R8, [R1+0x10] ;", 4),
        ("/*0010*/  LDL.U8 R8, [R1+0x10] ;", 1),
        ("/*0010*/  LDG.E.128 R8, [R1+0x10] ;", 0),
        ("/*0010*/  STS.128 [R1], R4 ;", 0),
    ],
)
def test_bytes_of_local_accesses(line, bytes_):
    assert inspect.read_local_accesses(f"{line}\n{line}\n") == 2 * bytes_


def test_amd_metadata():
    text = "    .private_segment_fixed_size: 24\n    .sgpr_count: 16\n    .vgpr_count:     248\n"
    assert inspect.read_amdgcn(text) == (248, 24)


# --- judging ----------------------------------------------------------------------------------------------

FINE = Measured(registers=128, spilled_bytes=0, shared_bytes=65_536, tensor_core="wgmma")


@pytest.mark.parametrize(
    "arch, changes, problem",
    [
        ("sm_90", {}, None),
        ("sm_90", {"spilled_bytes": 8}, None),  # the budget
        ("sm_90", {"spilled_bytes": 12}, "spills 12 bytes, budget 8"),
        ("sm_100", {"spilled_bytes": 12}, "spills 12 bytes, budget 8"),
        ("gfx942", {"spilled_bytes": 12}, None),
        ("sm_80", {"shared_bytes": 166_913}, "takes 166913 bytes of shared memory where sm_80 has 166912"),
        ("sm_90", {"shared_bytes": 232_448}, None),
        ("gfx942", {"shared_bytes": 65_537}, "takes 65537 bytes of shared memory where gfx942 has 65536"),
        ("sm_90", {"tensor_core": ""}, "has no tensor-core instruction"),
    ],
)
def test_verdicts(arch, changes, problem):
    measured = Measured(**(vars(FINE) | changes))
    found = judge(product_variant(spill_budget=8), ARCHS[arch], measured)
    assert found == ([] if problem is None else [problem])


def test_a_chip_can_be_held_to_no_spills_at_all():
    variant = product_variant(spill_budget=8, spill_free=frozenset({"sm_90"}))
    measured = Measured(**(vars(FINE) | {"spilled_bytes": 4}))
    assert judge(variant, ARCHS["sm_80"], measured) == []
    assert judge(variant, ARCHS["sm_90"], measured) == ["spills 4 bytes, budget 0"]


def test_several_problems_are_all_told():
    measured = Measured(255, 400, 300_000, "")
    assert len(judge(product_variant(), ARCHS["sm_90"], measured)) == 3


# --- compiling --------------------------------------------------------------------------------------------

WRONG = {
    "undefined_name": KernelVariant("toy", broken, {"x": "*fp32", "N": "constexpr"}, {"N": 16}),
    "signature lacks y": KernelVariant("toy", hungry, {"x": "*fp32", "N": "constexpr"}, {"N": 16}),
    "signature names no argument of the kernel: z": KernelVariant("toy", broken, {"z": "i32"}, {"N": 16}),
    "without value or type: N": KernelVariant("toy", broken, {"x": "*fp32", "N": "constexpr"}, {}),
}


def run_python(*arguments):
    """In a process whose kernels are defined for the compiler, as users' are."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def _compile_toys() -> None:
    """Runs in such a process: print what becomes of the toys, and of the command when it is given them."""
    spilled = inspect_variant(hungry_variant(), ARCHS["sm_90"])
    results = {
        "products": [inspect_variant(product_variant(n=128, num_warps=8), arch) for arch in ARCHS.values()],
        "hungry": [
            spilled,
            inspect_variant(hungry_variant(spill_budget=spilled.measured.spilled_bytes), ARCHS["sm_90"]),
            inspect_variant(hungry_variant(n=512), ARCHS["sm_90"]),
            inspect_variant(hungry_variant(n=512, tensor_core=True), ARCHS["sm_80"]),
        ],
        "wrong": [inspect_variant(variant, ARCHS["sm_90"]) for variant in WRONG.values()],
    }
    results = {name: [asdict(report) for report in reports] for name, reports in results.items()}
    inspect.ops_with_kernels, inspect.variants_of = lambda: ["toy"], lambda op: TOYS
    table = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(table):
        path = Path(folder) / "report.json"
        results["status"] = [
            inspect.main(["--arch", "sm_90", "--json", str(path)]),
            inspect.main(["--arch", "sm_80", "sm_90", "--kernel", "product"]),
        ]
        results["written"] = json.loads(path.read_text())
    print(json.dumps(results | {"table": table.getvalue().splitlines()}))


@pytest.fixture(scope="module")
def compiled():
    """What :func:`_compile_toys` prints; here the kernels are defined for the interpreter."""
    done = run_python("-c", f"import {__name__} as tests; tests._compile_toys()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_finds_the_tensor_core_instruction(compiled):
    for report, instruction in zip(compiled["products"], ("mma.sync", "wgmma", "tcgen05", "mfma")):
        measured = report["measured"]
        assert report["problems"] == []
        assert measured["tensor_core"] == instruction
        assert 16 < measured["registers"] <= 512
        assert 0 < measured["shared_bytes"] < ARCHS[report["arch"]].shared_limit


def test_a_variant_that_spills_over_its_budget_fails(compiled):
    strict, lenient, small, _ = compiled["hungry"]
    spilled = strict["measured"]["spilled_bytes"]
    assert spilled > 100 and strict["measured"]["registers"] == 255
    assert strict["problems"] == [f"spills {spilled} bytes, budget 0"]
    assert lenient["measured"]["spilled_bytes"] == spilled and lenient["problems"] == []
    assert small["measured"]["spilled_bytes"] == 0 and small["problems"] == []


def test_a_variant_without_the_tensor_core_it_must_have_fails(compiled):
    assert compiled["hungry"][-1]["problems"] == ["has no tensor-core instruction"]


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_a_variant_that_does_not_compile_is_a_result(compiled, i):
    report = compiled["wrong"][i]
    assert report["measured"] is None
    assert len(report["problems"]) == 1 and report["problems"][0].startswith("does not compile: ")
    assert list(WRONG)[i] in report["problems"][0]


# --- the command ------------------------------------------------------------------------------------------


def test_exit_status_table_and_json(compiled):
    assert compiled["status"] == [1, 0]
    title, first, second, summary, *again = compiled["table"]
    assert title.split()[:6] == ["variant", "arch", "warps", "stages", "regs", "spilled"]
    assert first.endswith("wgmma") and "FAILED" not in first
    assert "FAILED: spills" in second
    assert summary == "2 compiled, 1 failed"
    assert again[-1] == "2 compiled, all well"
    assert [row["variant"] for row in compiled["written"]] == [variant.name for variant in TOYS]
    assert compiled["written"][0]["measured"]["tensor_core"] == "wgmma"


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--arch", "sm_90", "sm_7"], "--arch must be of sm_80, sm_90, sm_100, gfx942, got sm_7"),
        (["--op", "attention"], "--op must be of toy, got attention"),
        (["--kernel", "nothing"], "--kernel 'nothing' is in the name of no variant of toy"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_is_told_in_one_sentence(monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(inspect, "ops_with_kernels", lambda: ["toy"])
    monkeypatch.setattr(inspect, "variants_of", lambda op: TOYS)
    assert inspect.main(arguments) == 2
    assert capsys.readouterr() == ("", f"refine_kernels.inspect: {complaint}\n")


def test_refuses_to_run_interpreted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert inspect.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_the_command_compiles_real_kernels(tmp_path):
    path = tmp_path / "report.json"
    subset = "--arch", "sm_90", "--op", "delta_rule", "--kernel", "recurrent gated K128 V128 bf16"
    done = run_python("-m", "refine_kernels.inspect", *subset, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text())
    assert row["measured"]["spilled_bytes"] == 0 and row["measured"]["registers"] > 64


def test_no_chunk_kernel_of_the_delta_rule_spills_on_hopper(tmp_path):
    path = tmp_path / "report.json"
    subset = "--arch", "sm_90", "--op", "delta_rule", "--kernel", "K128 V128 bfloat16", "--jobs", "2"
    done = run_python("-m", "refine_kernels.inspect", *subset, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())
    assert {row["variant"].split()[0].split(".")[1] for row in rows} == {
        "inverse",
        "scan",
        "join",
        "reverse",
        "gradient",
    }
    assert all(row["measured"]["spilled_bytes"] == 0 for row in rows)


@pytest.mark.slow
def test_every_kernel_on_every_chip():
    done = run_python("-m", "refine_kernels.inspect", "--jobs", str(min(os.cpu_count(), 4)))
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line)
    for op in inspect.ops_with_kernels():
        assert f"\n{op}." in done.stdout
