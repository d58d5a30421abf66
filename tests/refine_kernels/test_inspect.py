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
from refine_kernels.launches import KernelVariant


@triton.jit
def product(a, b, c, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def chained(a, b, c, N: tl.constexpr):
    """A product that takes another's result."""
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    b_b = tl.load(b + tile)
    b_p = tl.dot(tl.load(a + tile), tl.trans(b_b))
    tl.store(c + tile, tl.dot(b_p.to(tl.bfloat16), b_b))


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


def chained_variant(num_warps):
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "N": "constexpr"}
    aligned = frozenset("abc")
    return KernelVariant(
        "toy.chained",
        chained,
        signature,
        {"N": 64},
        num_warps=num_warps,
        tensor_core=True,
        divisible_by_16=aligned,
    )


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
    variant = product_variant(spill_budget=8, chip_budgets={"sm_90": 0})
    measured = Measured(**(vars(FINE) | {"spilled_bytes": 4}))
    assert judge(variant, ARCHS["sm_80"], measured) == []
    assert judge(variant, ARCHS["sm_90"], measured) == ["spills 4 bytes, budget 0"]


def test_several_problems_are_all_told():
    measured = Measured(255, 400, 300_000, "")
    assert len(judge(product_variant(), ARCHS["sm_90"], measured)) == 3


# --- compiling --------------------------------------------------------------------------------------------

WRONG = {
    "undefined_name": KernelVariant("toy", broken, {"x": "*fp32", "N": "constexpr"}, {"N": 16}),
    "signature must be of x, y, N": KernelVariant("toy", hungry, {"x": "*fp32", "N": "constexpr"}, {"N": 16}),
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
        "chained": [inspect_variant(chained_variant(warps), ARCHS["sm_90"]) for warps in (4, 8)],
        "wrong": [inspect_variant(variant, ARCHS["sm_90"]) for variant in WRONG.values()],
    }
    results = {name: [asdict(report) for report in reports] for name, reports in results.items()}
    inspect.ops_with_kernels, inspect.variants_of = lambda: ["toy"], lambda op, arch: TOYS
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


INSTRUCTIONS = ("mma.sync", "mma.sync", "mma.sync", "wgmma", "tcgen05", "mma.sync", "mfma")


def test_finds_the_tensor_core_instruction(compiled):
    for report, instruction in zip(compiled["products"], INSTRUCTIONS, strict=True):
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


def test_products_whose_warps_reach_over_their_rows(compiled):
    """Chained products of 64 rows: four warps take 64 rows of shared memory, eight take 128."""
    four, eight = compiled["chained"]
    assert four["problems"] == []
    if not eight["measured"]["reaching_over"]:
        pytest.skip("this release of Triton lines warps up otherwise")
    assert eight["problems"] == ["has products whose warps reach over their rows: 64x64 by 8x1 warps"]


@pytest.mark.parametrize("i", range(len(WRONG)))
def test_a_variant_that_does_not_compile_is_a_result(compiled, i):
    report = compiled["wrong"][i]
    assert report["measured"] is None
    assert len(report["problems"]) == 1 and report["problems"][0].startswith("does not compile: ")
    assert list(WRONG)[i] in report["problems"][0]


# --- what launchers launch --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n"])
def scaled(x, y, n, m, scale, N: tl.constexpr):
    pass


def _record() -> None:
    """Runs in such a process: what the launchers launch on every chip, and for many lengths."""
    import importlib
    import itertools

    import torch

    from refine_kernels import launches
    from refine_kernels.chips import Chip

    def call():
        x = torch.empty(40, device="meta", dtype=torch.bfloat16)
        for n, m in ((1, 1), (16, 32), (5, 32), (7, 3)):
            scaled[(1,)](x[8:], x[1:].float() if m == 3 else None, n, m, 0.5, N=16, num_warps=2)

    toys = launches.recorded("toy", [launches.Call("call", call, lambda kernel: {})], Chip("sm_90", 132))
    fields = ("name", "signature", "constants", "num_warps", "divisible_by_16")
    results = {"toys": [[getattr(variant, name) for name in fields] for variant in toys]}
    for op in inspect.ops_with_kernels():
        modules = [importlib.import_module(f"refine_kernels.{op}.{x}") for x in KERNEL_FILES[op]]
        there = {x for m in modules for x in vars(m) if x.endswith("_kernel")}
        results[op] = {"there": there}
        for arch in ARCHS:
            variants = inspect.variants_of(op, arch)
            results[op][arch] = [[v.name, v.kernel.__name__, v.constants.get("BV", 0)] for v in variants]

    from refine_kernels.delta_rule import variants as delta
    from refine_kernels.lact import variants as lact
    from refine_kernels.linear_logprob import variants as linear

    lengths = [
        *range(513, 537),
        640,
        701,
        768,
        800,
        999,
        1000,
        1024,
        1500,
        1777,
        2000,
        2048,
        3000,
        3333,
        4096,
        5000,
    ]
    uses = {
        "delta_rule": lambda n: delta._chunks(64, 64, torch.bfloat16, True, 8, 16, n, training=True),
        "lact": lambda n: lact._scan(lact.WIDTHS[0], torch.bfloat16, n, True, False, True),
        "linear_logprob": lambda n: linear._forward(
            n, 64, 1000, torch.bfloat16, True, True, True, False, False
        ),
    }
    for op, use in uses.items():
        calls = [launches.Call(str(n), lambda n=n, use=use: use(n), lambda kernel: {}) for n in lengths]
        found = [v.kernel.__name__ for v in launches.recorded(op, calls, Chip("sm_90", 132))]
        results[f"{op} lengths"] = {name: len(list(same)) for name, same in itertools.groupby(sorted(found))}
    print(json.dumps(results, default=sorted))


KERNEL_FILES = {
    "delta_rule": ("triton_chunk", "triton_recurrent"),
    "lact": ("triton_products", "triton_update", "triton_edges"),
    "linear_logprob": ("triton_forward", "triton_rows"),
}


@pytest.fixture(scope="module")
def launched():
    done = run_python("-c", f"import {__name__} as tests; tests._record()")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_launch_is_written_down_as_triton_compiles_it(launched):
    first, second, third = launched["toys"]
    assert first[0] == "toy.scaled call (1)"
    assert first[1] == {
        "x": "*bf16",
        "y": "constexpr",
        "n": "i32",
        "m": "constexpr",
        "scale": "fp32",
        "N": "constexpr",
    }
    assert first[2] == {"y": None, "m": 1, "N": 16} and first[3] == 2 and first[4] == ["x"]
    assert second[1]["m"] == "i32" and second[4] == ["m", "x"]  # n = 16 and n = 5 are one variant
    assert third[1]["y"] == "*fp32" and third[4] == ["x", "y"]  # of a copy


@pytest.mark.parametrize("op", KERNEL_FILES)
def test_every_kernel_is_launched_for_every_chip(op, launched):
    for arch in ARCHS:
        names, kernels, _ = zip(*launched[op][arch])
        assert len(set(names)) == len(names)
        assert set(kernels) == set(launched[op]["there"])


def test_chips_get_their_own_tiles(launched):
    """227 KB of shared memory take 256 columns of logits; Blackwell's tensor memory takes chunks of its own."""
    columns = {
        arch: max(x[2] for x in launched["linear_logprob"][arch] if "forward" in x[1]) for arch in ARCHS
    }
    assert {arch for arch, n in columns.items() if n == 256} == {"sm_90", "sm_100"}
    assert launched["delta_rule"]["sm_100"] != launched["delta_rule"]["sm_90"]


@pytest.mark.parametrize(("op", "most"), [("delta_rule", 2), ("lact", 4), ("linear_logprob", 8)])
def test_no_kernel_is_compiled_anew_for_a_number_of_tokens(op, most, launched):
    """Over 39 lengths: what is left are tiles, splits, and strides that are a multiple of 16 or not."""
    assert max(launched[f"{op} lengths"].values()) <= most


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
        (["--arch", "sm_90", "sm_7"], f"--arch must be of {', '.join(ARCHS)}, got sm_7"),
        (["--op", "attention"], "--op must be of toy, got attention"),
        (["--kernel", "nothing"], "--kernel 'nothing' is in the name of no variant of toy"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_is_told_in_one_sentence(monkeypatch, capsys, arguments, complaint):
    monkeypatch.setattr(inspect, "ops_with_kernels", lambda: ["toy"])
    monkeypatch.setattr(inspect, "variants_of", lambda op, arch: TOYS)
    assert inspect.main(arguments) == 2
    assert capsys.readouterr() == ("", f"refine_kernels.inspect: {complaint}\n")


def test_refuses_to_run_interpreted(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert inspect.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_the_command_compiles_real_kernels(tmp_path):
    path = tmp_path / "report.json"
    subset = "--arch", "sm_90", "--op", "delta_rule", "--kernel", "recurrent K128 V128 bfloat16 gated"
    done = run_python("-m", "refine_kernels.inspect", *subset, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text())
    assert row["measured"]["spilled_bytes"] == 0 and row["measured"]["registers"] > 64


@pytest.mark.slow
def test_kernels_of_the_delta_rule_keep_their_registers_on_hopper(tmp_path):
    path = tmp_path / "report.json"
    subset = "--arch", "sm_90", "--op", "delta_rule", "--kernel", "K128 V128 bfloat16 gated", "--jobs", "2"
    done = run_python("-m", "refine_kernels.inspect", *subset, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())
    kernels = {row["variant"].split()[0].removeprefix("delta_rule.") for row in rows}
    assert kernels == {
        "inverse",
        "scan",
        "states",
        "reverse",
        "gradient",
        "recurrent",
        "decode",
    }  # join has no gate
    for row in rows:  # four warps for the gradient cost it some: README.md
        most = 512 if "gradient" in row["variant"] else 128
        assert row["measured"]["spilled_bytes"] <= most, row["variant"]


@pytest.mark.slow
def test_every_kernel_on_every_chip():
    done = run_python("-m", "refine_kernels.inspect", "--jobs", str(min(os.cpu_count(), 4)))
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAILED" in line)
    for op in inspect.ops_with_kernels():
        assert f"\n{op}." in done.stdout
