"""LaCT's kernels against the definition, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from refine_kernels.lact import (
    Widths,
    chunk_lact,
    lact_apply,
    lact_finish,
    lact_prepare,
    triton_apply,
)
from refine_kernels.lact import edges as edges_module
from refine_kernels.lact import op as lact_op
from refine_kernels.lact import triton_products as products
from tests.numerics import assert_close
from tests.refine_kernels import test_lact as torch_path
from tests.refine_kernels.test_lact import MODES, NAMES, arguments_of, gradients, to_double

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = {"use_momentum": True, "use_muon": False, "prenorm": True}
PLAIN = {"use_momentum": False, "use_muon": False, "prenorm": False}
pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


def make_inputs(*arguments, **options):
    inputs = torch_path.make_inputs(*arguments, **options)
    return {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}


def run(inputs, **options):
    return torch_path.run(inputs, backend="triton", **options)


def check(inputs, mode, tolerance=1e-5, **options):
    """Values and gradients against the definition in float64."""
    torch_path.check(inputs, tolerance, backend="triton", **options, **arguments_of(mode))


# --- parity -----------------------------------------------------------------------------------------------


def test_golden(golden_dir):
    cases = torch.load(golden_dir / "lact_ops.pt", weights_only=True)
    for case, values in cases.items():
        if "l96" not in case and values["in/q"].shape[1] != 80:
            continue
        leaves = {n: values[f"in/{n}"].to(DEVICE).requires_grad_() for n in NAMES if f"in/{n}" in values}
        o = chunk_lact(
            *(leaves[name] for name in NAMES[:-1]), momentum=leaves.get("momentum"),
            chunk_size=int(values["chunk"]), use_muon=bool(values["use_muon"]), backend="triton",
        )  # fmt: skip
        assert_close(o.cpu(), values["fp64/out"], 1e-5, f"{case} o")
        found = torch.autograd.grad(o, list(leaves.values()), values["in/cot"].to(DEVICE))
        tolerance = 1e-4 if values["use_muon"] else 1e-5
        for name, d in zip(leaves, found):
            assert_close(d.cpu(), values[f"fp64/grad_{name}"], tolerance, f"{case} d{name}")


@pytest.mark.parametrize("tokens", [1, 16, 17, 40])
@MODES
def test_lengths(tokens, mode, poisoned):
    """Shorter than one chunk, exactly one, one over, several with a part; nothing unwritten is returned."""
    check(make_inputs(2, tokens, (6, 8, 5), use_momentum=mode["use_momentum"]), mode, chunk_size=16)


@pytest.mark.parametrize("widths", [(1, 1, 1), (33, 70, 20), (140, 33, 48)], ids=str)
@pytest.mark.parametrize("mode", [ALL, PLAIN | {"use_muon": True}], ids=["momentum+prenorm", "muon"])
def test_widths(widths, mode):
    """Over a tile's edge in every dimension, never a multiple of one."""
    check(make_inputs(1, 21, widths, use_momentum=mode["use_momentum"]), mode, chunk_size=10)


@pytest.mark.parametrize("chunk_size", [1, 7, 70, 130])
def test_chunk_sizes(chunk_size):
    """Within a tile of tokens and over it."""
    tokens = {1: 4, 7: 20, 70: 150, 130: 140}[chunk_size]
    check(make_inputs(1, tokens, (8, 6, 10)), ALL, chunk_size=chunk_size)


def test_a_chunk_in_parts():
    """So few tiles that the tokens of a chunk are split over programs."""
    tile = products.outer_tile(torch.float32)
    assert products.choose_splits(1, 1, 700, Widths(8, 6, 10), tile) == 2
    check(make_inputs(1, 710, (8, 6, 10)), ALL, chunk_size=700)


def test_float16():
    inputs = make_inputs(2, 40, (33, 20, 16))
    inputs = {n: x.half() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    for mode in (ALL, ALL | {"use_muon": True}):
        check(inputs, mode, 2e-3, chunk_size=16)
        found = run(inputs, chunk_size=16)
        assert found["o"].dtype == found["dk"].dtype == torch.float16
        assert found["weights.applied"].dtype == found["dlr0"].dtype == torch.float32


def test_float16_far_from_one():
    """Rates and gradients that float16 cannot hold: 1e-9 a token, and 1e6 backwards."""
    inputs = make_inputs(1, 40, (8, 6, 10))
    inputs |= {n: inputs[n].half() for n in ("q", "k", "v")}
    inputs |= {n: 1e-9 * inputs[n] for n in ("lr0", "lr1", "lr2")}

    def found(inputs, backend):
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
        _, state = chunk_lact(**leaves, chunk_size=16, output_final_state=True, backend=backend)
        loss = 1e6 * state.weights.momentum.sum()
        return torch.autograd.grad(loss, [leaves[n] for n in ("lr0", "lr1", "lr2", "w0")])

    for a, b in zip(found(inputs, "triton"), found(to_double(inputs), "reference")):
        assert_close(a, b, 1e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 arithmetic")
@MODES
def test_bfloat16(mode):
    """No further from float64 than a few roundings of every operand."""
    inputs = make_inputs(4, 700, (192, 160, 128), use_momentum=mode["use_momentum"])
    inputs = {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    if mode["use_muon"]:
        options = {"chunk_size": 256, "with_gradients": False, **arguments_of(mode)}
        expected = torch_path.run(to_double(inputs), backend="reference", **options)
        assert_close(run(inputs, **options)["o"], expected["o"], 3e-2, "o")
    else:
        check(inputs, mode, 1.5e-2, chunk_size=256)


def test_float64_takes_the_pytorch_path():
    inputs = make_inputs(1, 40, (6, 8, 5), dtype=torch.float64)
    expected = torch_path.run(inputs, backend="torch", chunk_size=16)
    for name, x in run(inputs, chunk_size=16).items():
        assert torch.equal(x, expected[name]), name


def test_the_same_bits_every_time():
    inputs = make_inputs(1, 600, (8, 6, 10))
    first, second = (run(inputs, chunk_size=520) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_no_rows():
    found = run(make_inputs(0, 40, (6, 8, 5)), chunk_size=16)
    assert found["o"].shape == (0, 40, 5) and found["dk"].shape == (0, 40, 6)


# --- scan and apply apart ---------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [None, 0, 2, 3], ids=lambda x: "all" if x is None else str(x))
@pytest.mark.parametrize(
    "mode",
    [ALL, ALL | {"use_muon": True}, PLAIN, PLAIN | {"use_muon": True}],
    ids=["all", "all+muon", "plain", "muon"],
)
def test_gradients_through_every_entry_of_a_scan(mode, entries, poisoned):
    inputs = torch_path.scan_inputs(mode, updates=3, dtype=torch.float32)
    inputs = {n: None if x is None else x.to(DEVICE) for n, x in inputs.items()}
    options = {"updates": 3, "use_muon": mode["use_muon"], "entries": entries}
    found = torch_path.scan(inputs, backend="triton", **options)
    expected = torch_path.scan(to_double(inputs), backend="reference", **options)
    plain = torch_path.scan(inputs, backend="reference", **options) if mode["use_muon"] else None
    torch_path.assert_same(found, expected, 1e-5, plain)


@pytest.mark.parametrize(("offset", "tokens"), [(0, 3), (3, 5), (3, 6), (8, 9), (5, 27), (20, 8)])
@pytest.mark.parametrize("entries_at_a_time", [1, 2, 100])
def test_apply_from_an_offset(offset, tokens, entries_at_a_time, poisoned, monkeypatch):
    """A chunk already begun, whole chunks, a chunk's start; entries that nobody reads get a gradient of 0."""
    monkeypatch.setattr(triton_apply, "HIDDEN_UNITS", entries_at_a_time * 2 * min(8, tokens) * 8)
    widths = torch_path.WIDTHS
    q = make_inputs(2, tokens, widths)["q"]
    stack = 0.3 * torch.randn(2, (offset + tokens - 1) // 8 + 2, widths.size).to(DEVICE)

    def run_apply(backend, dtype):
        leaves = {"stack": stack.to(dtype).requires_grad_(), "q": q.to(dtype).requires_grad_()}
        o = lact_apply(**leaves, widths=widths, chunk_size=8, offset=offset, backend=backend)
        return {"o": o.detach()} | gradients({"o": o}, leaves)

    found, expected = run_apply("triton", torch.float32), run_apply("reference", torch.float64)
    torch_path.assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("mode", [ALL, PLAIN | {"use_muon": True}], ids=["momentum+prenorm", "muon"])
def test_resuming_equals_one_pass(mode):
    inputs = make_inputs(2, 50, (6, 8, 5), use_momentum=mode["use_momentum"])
    options = {"chunk_size": 16, "backend": "triton", **arguments_of(mode)}
    parts = torch_path.run(inputs, op=torch_path.in_parts(5, 16, 41), **options)
    expected = torch_path.run(to_double(inputs), **options | {"backend": "reference"})
    plain = torch_path.run(inputs, **options | {"backend": "reference"}) if mode["use_muon"] else None
    torch_path.assert_same(parts, expected, 1e-5, plain)


# --- before and after the fast weights ---------------------------------------------------------------------


def edges(dtype=torch.float32, gated=True, **options):
    """The same numbers for the kernels and, in float64, for the PyTorch path."""
    before, after, angles = torch_path.edge_inputs(**options)
    if not gated:
        del after["gate"]
    cast = lambda x: x.to(dtype).to(DEVICE)  # noqa: E731
    before, after = ({n: cast(x) for n, x in given.items()} for given in (before, after))
    return before, after, tuple(cast(x) for x in angles)


@pytest.mark.parametrize(
    ("turned", "silu", "v_silu"),
    [(6, True, True), (1, True, False), (None, True, True), (None, False, False)],
)
def test_prepare(turned, silu, v_silu, poisoned):
    before, _, angles = edges(turned=turned or 1)
    options = {"num_heads": 3, "silu": silu, "v_silu": v_silu}
    doubles = None if turned is None else tuple(x.double() for x in angles)
    expected = torch_path.run_edge(lact_prepare, to_double(before), doubles, backend="torch", **options)
    arguments = (None if turned is None else angles,)
    found = torch_path.run_edge(lact_prepare, before, *arguments, backend="triton", **options)
    torch_path.assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("gated", [True, False])
def test_finish(gated, poisoned):
    _, after, _ = edges(gated=gated)
    arguments = () if gated else (None,)
    expected = torch_path.run_edge(lact_finish, to_double(after), *arguments, backend="torch")
    found = torch_path.run_edge(lact_finish, after, *arguments, backend="triton")
    torch_path.assert_same(found, expected, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_edges_over_many_tokens(dtype, tolerance):
    """Several programs a head, of views of one projection; heads wider than q's for v."""
    before, after, angles = edges(dtype, batch=1, tokens=270, heads=1, width=100, v_width=120, turned=25)
    fused = torch.cat([before["q"], before["k"], before["v"]], -1)
    views = before | dict(zip("qkv", fused.split([100, 100, 120], -1)))
    for op, inputs, more, options in (
        (lact_prepare, views, [angles], {"num_heads": 1}),
        (lact_finish, after | {"o": after["o"].transpose(1, 2).contiguous().transpose(1, 2)}, [], {}),
    ):
        doubles = [tuple(x.double() for x in given) for given in more]
        expected = torch_path.run_edge(op, to_double(inputs), *doubles, backend="torch", **options)
        found = torch_path.run_edge(op, inputs, *more, backend="triton", **options)
        torch_path.assert_same(found, expected, tolerance)


def test_opcheck_of_the_edges():
    before, after, angles = edges()
    utils = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    leaves = [x.requires_grad_() for x in before.values()]
    torch.library.opcheck(edges_module._prepare_op, (*leaves, *angles, 3, True, True), **utils)
    torch.library.opcheck(
        edges_module._finish_op, (*(x.requires_grad_() for x in after.values()), 1e-5), **utils
    )


# --- layouts ----------------------------------------------------------------------------------------------


def test_views_of_a_fused_projection():
    """Nothing is assumed of the strides over rows and tokens, nor of the last dimension."""
    inputs = make_inputs(2, 40, (10, 8, 10))
    fused = (
        torch.stack([inputs["q"], inputs["k"], inputs["v"]], 2).transpose(0, 1).contiguous().transpose(0, 1)
    )
    rates = torch.cat([inputs[n] for n in ("lr0", "lr1", "lr2", "momentum")], -1)
    views = inputs | {n: fused[:, :, i] for i, n in enumerate("qkv")}
    views |= {n: rates[..., i : i + 1] for i, n in enumerate(("lr0", "lr1", "lr2", "momentum"))}
    views["v"] = views["v"].transpose(1, 2).contiguous().transpose(1, 2)
    views["w1"] = views["w1"].mT.contiguous().mT
    assert not any(views[n].is_contiguous() for n in ("q", "k", "v", "lr0", "momentum", "w1"))
    torch_path.assert_same(run(views, chunk_size=16), run(inputs, chunk_size=16), 1e-6)


def test_one_upstream_gradient_for_all_tokens():
    """An expanded gradient, as ``o.sum()`` sends."""
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        inputs = {n: x.requires_grad_() for n, x in make_inputs(1, 40, (6, 8, 5), dtype=dtype).items()}
        o = chunk_lact(**inputs, chunk_size=16, backend=backend)
        found.append(torch.autograd.grad(o.sum(), list(inputs.values())))
    for name, a, b in zip(NAMES, *found):
        assert_close(a, b, 1e-5, name)


@MODES
def test_inputs_are_never_written(mode):
    inputs = torch_path.scan_inputs(mode, updates=2, dtype=torch.float32)
    inputs = {n: None if x is None else x.to(DEVICE) for n, x in inputs.items()}
    before = {n: None if x is None else x.clone() for n, x in inputs.items()}
    torch_path.scan(inputs, updates=2, use_muon=mode["use_muon"], backend="triton")
    for name, x in inputs.items():
        assert x is None or torch.equal(x, before[name]), name


# --- torch.library ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [ALL, PLAIN | {"use_muon": True}], ids=["momentum+prenorm", "muon"])
def test_opcheck_of_the_scan(mode):
    arguments = [
        x.to(DEVICE).detach() if isinstance(x, torch.Tensor) else x for x in torch_path.op_arguments(mode)
    ]
    arguments = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(
        lact_op._scan_op, (*arguments[:-1], "triton"), test_utils=("test_schema", "test_faketensor")
    )
    with torch.no_grad():
        stack, sums, steps, divisors = lact_op._scan_op(*arguments[:-1], "triton")
    given = (stack, sums if mode["prenorm"] else None, steps if mode["use_momentum"] else None)
    saved = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[3:10]]
    options = (list(torch_path.WIDTHS), 8, mode["use_muon"], mode["prenorm"], "triton")
    torch.library.opcheck(
        lact_op._scan_backward_op, (stack, steps, divisors, *saved, *given, *options),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


def test_opcheck_of_apply():
    stack, q, d_o = (torch.randn(2, *shape).to(DEVICE) for shape in ((3, 136), (19, 6), (19, 5)))
    for op, tensors in ((lact_op._apply_op, (stack, q)), (lact_op._apply_backward_op, (stack, q, d_o))):
        arguments = (*tensors, [6, 8, 5], 8, 5, "triton")
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from refine_kernels import chunk_lact;"
        "x = torch.ones(1, 4, 4); rates = [x[..., :1]] * 3;"
        "print(chunk_lact(x, x, x, x, x, x, *rates, chunk_size=2, backend='torch').shape)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "torch.Size([1, 4, 4])" in result.stdout, result.stderr


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, tokens, splits", [(4, 2048, 2), (16, 2048, 1), (1, 2048, 8), (1, 300, 1)])
def test_splits_fill_a_gpu(rows, tokens, splits):
    """Four heads of 384 x 384 are 108 tiles: their tokens go in two parts, those of a batch of four in one."""
    tile = products.outer_tile(torch.bfloat16)
    assert products.choose_splits(rows, 1, tokens, Widths(384, 384, 384), tile) == splits
