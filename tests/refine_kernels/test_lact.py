"""LaCT's fast weights against their definition: every output and every gradient, every way of calling them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.lact import (
    LaCTState,
    LaCTWeights,
    Widths,
    chunk_lact,
    lact_apply,
    lact_finish,
    lact_prepare,
    lact_scan,
)
from refine_kernels.lact import op as lact_op
from refine_kernels.lact.newton_schulz import newton_schulz, newton_schulz_backward
from tests.numerics import assert_close, relative_error

NAMES = ("w0", "w1", "w2", "q", "k", "v", "lr0", "lr1", "lr2", "momentum")
TOKENS = ("k", "v", "lr0", "lr1", "lr2", "momentum")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OPTIONS = [
    {"use_momentum": momentum, "use_muon": muon, "prenorm": prenorm}
    for momentum, muon, prenorm in itertools.product((False, True), repeat=3)
]
MODES = pytest.mark.parametrize(
    "mode", OPTIONS, ids=lambda mode: "+".join(name for name, on in mode.items() if on) or "plain"
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors here are small: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(rows, tokens, widths=(16, 24, 12), *, use_momentum=True, dtype=torch.float32, seed=0):
    """Inputs as a model makes them; rates so high that a chunk changes its weights by about a third."""
    dk, dh, dv = widths
    random = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    inputs = {
        "w0": new(rows, dh, dk) / dk**0.5,
        "w1": new(rows, dv, dh) / dh**0.5,
        "w2": new(rows, dh, dk) / dk**0.5,
        "q": F.normalize(F.silu(new(rows, tokens, dk)), dim=-1),
        "k": F.normalize(F.silu(new(rows, tokens, dk)), dim=-1),
        "v": F.silu(new(rows, tokens, dv)),
        **{name: F.softplus(new(rows, tokens, 1) - 2) for name in ("lr0", "lr1", "lr2")},
        "momentum": new(rows, tokens, 1).sigmoid() if use_momentum else None,
    }
    return {name: None if x is None else x.to(dtype) for name, x in inputs.items()}


def to_double(inputs):
    return {name: None if x is None else x.double() for name, x in inputs.items()}


def state_tensors(state):
    """The tensors of a state by name."""
    weights = {f"weights.{name}": getattr(state.weights, name) for name in ("applied", "unnormalised")}
    tensors = weights | {"weights.momentum": state.weights.momentum}
    tensors |= {f"open {name}": getattr(state, name) for name in TOKENS}
    return {name: x for name, x in tensors.items() if x is not None}


def gradients(outputs, leaves, through=None):
    """``{"d" + name: gradient}`` of ``leaves``, that fixed random weights on ``outputs`` send back."""
    random = torch.Generator().manual_seed(1)
    # of bfloat16's precision, so that the same gradients arrive whatever the dtype of the outputs
    weights = {n: torch.randn(x.shape, generator=random).bfloat16() for n, x in outputs.items()}
    used = [n for n in outputs if (through is None or n in through) and outputs[n].requires_grad]
    found = torch.autograd.grad(
        [outputs[n] for n in used], list(leaves.values()), [weights[n].to(outputs[n]) for n in used],
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {f"d{name}": d for name, d in zip(leaves, found)}


def run(inputs, *, op=chunk_lact, through=None, with_gradients=True, **options):
    """Output and final state by name, and the gradients ("dq", ...)."""
    leaves = {n: x.detach().requires_grad_(with_gradients) for n, x in inputs.items() if x is not None}
    options.setdefault("output_final_state", True)
    positional = [leaves[name] for name in NAMES[:-1]]
    result = op(*positional, momentum=leaves.get("momentum"), **options)
    o, state = result if options["output_final_state"] else (result, None)
    outputs = {"o": o} | ({} if state is None else state_tensors(state))
    found = {name: x.detach() for name, x in outputs.items()}
    return found | (gradients(outputs, leaves, through) if with_gradients else {})


def arguments_of(mode):
    return {"use_muon": mode["use_muon"], "prenorm": mode["prenorm"]}


def assert_same(actual, expected, tolerance, plain=None):
    """Within ``tolerance``. Given ``plain``, the definition in the dtype of ``actual``, gradients go through Muon,
    which magnifies rounding by a step's small singular values: within 1e-4, or four times what ``plain`` loses.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        allowed = tolerance
        if plain is not None and name.startswith("d"):
            allowed = max(allowed, 1e-4, 4 * relative_error(plain[name], value))
        assert_close(actual[name], value, allowed, name)


def check(inputs, tolerance, *, backend="torch", **options):
    """A backend against the reference in float64, values and gradients."""
    expected = run(to_double(inputs), backend="reference", **options)
    muon = options.get("use_muon") and inputs["q"].dtype != torch.float64
    plain = run(inputs, backend="reference", **options) if muon else None
    assert_same(run(inputs, backend=backend, **options), expected, tolerance, plain)


# --- parity with the published numbers and with the definition ---------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_golden(golden_dir, dtype, backend):
    cases = torch.load(golden_dir / "lact_ops.pt", weights_only=True)
    for case, values in cases.items():
        inputs = {name: values[f"in/{name}"].to(dtype) for name in NAMES if f"in/{name}" in values}
        leaves = {name: x.requires_grad_() for name, x in inputs.items()}
        o = chunk_lact(
            *(leaves[name] for name in NAMES[:-1]), momentum=leaves.get("momentum"),
            chunk_size=int(values["chunk"]), use_muon=bool(values["use_muon"]), backend=backend,
        )  # fmt: skip
        assert_close(o, values["fp64/out"], TOLERANCE[dtype], f"{case} o")
        found = torch.autograd.grad(o, list(leaves.values()), values["in/cot"].to(dtype), allow_unused=True)
        tolerance = 1e-4 if dtype == torch.float32 and values["use_muon"] else TOLERANCE[dtype]
        for name, d in zip(leaves, found):
            expected = values.get(f"fp64/grad_{name}")
            if expected is None:
                assert d is None or d.count_nonzero() == 0, (case, name)
            else:
                assert_close(d, expected, tolerance, f"{case} d{name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("tokens", [1, 5, 31, 32, 33, 64, 65, 100])
@MODES
def test_lengths(tokens, mode, dtype):
    """Shorter than one chunk, exactly a multiple, one over, and anything."""
    inputs = make_inputs(2, tokens, use_momentum=mode["use_momentum"], dtype=dtype)
    check(inputs, TOLERANCE[dtype], chunk_size=32, **arguments_of(mode))


@pytest.mark.parametrize("chunk_size", [1, 7, 32])
@pytest.mark.parametrize("widths", [(16, 24, 12), (5, 3, 7), (20, 20, 20), (1, 1, 1), (33, 17, 48)], ids=str)
@MODES
def test_widths_and_chunk_sizes(widths, chunk_size, mode):
    tokens = {1: 4, 7: 20, 32: 70}[chunk_size]
    inputs = make_inputs(2, tokens, widths, use_momentum=mode["use_momentum"], dtype=torch.float64)
    check(inputs, 1e-10, chunk_size=chunk_size, **arguments_of(mode))


@MODES
def test_only_the_output(mode):
    """Without a final state; gradients from the output alone."""
    inputs = make_inputs(2, 40, use_momentum=mode["use_momentum"], dtype=torch.float64)
    check(inputs, 1e-10, chunk_size=16, output_final_state=False, **arguments_of(mode))


@pytest.mark.parametrize(
    "through",
    [("o",), ("weights.applied",), ("weights.unnormalised",), ("weights.momentum",)],
    ids=lambda x: x[0],
)
@pytest.mark.parametrize("use_muon", [False, True], ids=["plain", "muon"])
def test_gradients_from_any_output(through, use_muon):
    inputs = make_inputs(2, 40, dtype=torch.float64)
    check(inputs, 1e-10, chunk_size=16, use_muon=use_muon, prenorm=True, through=through)


@pytest.mark.parametrize(
    "frozen", [{"q", "k"}, {"v", "lr0", "momentum"}, {"w0", "w1", "w2"}], ids=lambda x: "+".join(sorted(x))
)
def test_some_inputs_without_gradient(frozen):
    inputs = make_inputs(1, 40, dtype=torch.float64)
    expected = run(inputs, backend="reference", chunk_size=16, output_final_state=False)
    leaves = {name: x.requires_grad_(name not in frozen) for name, x in inputs.items()}
    o = chunk_lact(*(leaves[n] for n in NAMES[:-1]), momentum=leaves["momentum"], chunk_size=16)
    asked = [name for name in NAMES if name not in frozen]
    random = torch.Generator().manual_seed(1)
    upstream = torch.randn(o.shape, generator=random).bfloat16().to(o)  # as in `gradients`
    for name, d in zip(asked, torch.autograd.grad(o, [leaves[n] for n in asked], upstream)):
        assert_close(d, expected[f"d{name}"], 1e-10, name)


def test_rows_do_not_see_one_another():
    inputs = make_inputs(3, 40)
    clean = run(inputs, chunk_size=16)
    for x in inputs.values():
        x[1] = torch.nan
    dirty = run(inputs, chunk_size=16)
    for name, x in dirty.items():
        assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name
        assert not x[1].isfinite().all(), name


@pytest.mark.parametrize("use_muon", [False, True], ids=["plain", "muon"])
def test_no_rows(use_muon):
    """A batch of branches may be empty."""
    found = run(make_inputs(0, 40), chunk_size=16, use_muon=use_muon)
    assert found["o"].shape == (0, 40, 12) and found["dq"].shape == (0, 40, 16)


def test_without_rates_nothing_moves():
    """Rates of 0: a chunk leaves its weights as they are, but for the 1e-5 beside the norm."""
    inputs = make_inputs(2, 40, dtype=torch.float64)
    for name in ("lr0", "lr1", "lr2"):
        inputs[name].zero_()
    check(inputs, 1e-10, chunk_size=16)
    found = run(inputs, chunk_size=40)["o"]
    assert_close(run(inputs, chunk_size=16)["o"], found, 1e-4)


def test_a_row_of_zeros_stays_zero_and_finite():
    inputs = make_inputs(1, 40, dtype=torch.float64)
    inputs["w0"][:, 3], inputs["w1"][:, 2] = 0.0, 0.0
    found = run(inputs, chunk_size=16)
    assert all(x.isfinite().all() for x in found.values())
    expected = run(inputs, backend="reference", chunk_size=16)
    w0, w1, _ = Widths(16, 24, 12).unpack(found["weights.applied"])
    assert w0[:, 3].count_nonzero() == 0 and w1[:, 2].count_nonzero() == 0
    for name in ("o", "dq", "dk", "dv", "dlr0", "dlr1", "dlr2", "dmomentum"):
        assert_close(found[name], expected[name], 1e-10, name)


# --- Newton-Schulz ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 10), (2, 10, 6), (3, 2, 7, 7), (1, 1, 3)], ids=str)
def test_newton_schulz(shape):
    """Singular values go towards 1, directions stay; the written-out gradient is autograd's."""
    g = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    x = newton_schulz(g)
    assert x.shape == g.shape
    u, _, vh = torch.linalg.svd(g.detach(), full_matrices=False)
    rotated = u.mT @ x.detach() @ vh.mT
    off_diagonal = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-10
    upstream = torch.randn_like(x)
    (expected,) = torch.autograd.grad(x, g, upstream)
    assert_close(newton_schulz_backward(g.detach(), upstream), expected, 1e-10)


def test_newton_schulz_in_bfloat16():
    """No worse than autograd through bfloat16 throughout, also for a gradient far from 1."""
    g = torch.randn(4, 48, 64, dtype=torch.float64)
    upstream = 1e-30 * torch.randn_like(g)
    exact, d_exact = newton_schulz(g), newton_schulz_backward(g, upstream)
    rounded = g.bfloat16().requires_grad_()
    plain = newton_schulz(rounded)
    (d_plain,) = torch.autograd.grad(plain, rounded, upstream.bfloat16())
    ours = newton_schulz(g.float(), torch.bfloat16)
    d_ours = newton_schulz_backward(g.float(), upstream.float(), torch.bfloat16)
    assert ours.dtype == d_ours.dtype == torch.float32
    assert relative_error(ours, exact) < 1.05 * relative_error(plain, exact) < 3e-2
    assert relative_error(d_ours, d_exact) < 1.05 * relative_error(d_plain, d_exact) < 6e-2


def test_newton_schulz_of_nothing():
    zero = torch.zeros(2, 4, 6)
    assert newton_schulz(zero).count_nonzero() == 0
    assert newton_schulz_backward(zero, torch.randn(2, 4, 6)).isfinite().all()


# --- resuming ---------------------------------------------------------------------------------------------


def in_parts(*cuts):
    """An op that reads its tokens in parts, each from the state that the one before left."""

    def op(w0, w1, w2, *tokens, momentum, **options):
        edges, outputs, state = [0, *cuts, tokens[0].shape[1]], [], None
        for start, end in itertools.pairwise(edges):
            part = (x[:, start:end] for x in tokens)
            rates = None if momentum is None else momentum[:, start:end]
            o, state = chunk_lact(w0, w1, w2, *part, momentum=rates, initial_state=state, **options)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    return op


@pytest.mark.parametrize("cuts", [(1,), (15,), (16,), (17,), (32,), (5, 16, 40), (40, 41, 42)], ids=str)
@MODES
def test_resuming_equals_one_pass(cuts, mode):
    """Inside a chunk, on its border, across several; values and gradients through the state's tensors."""
    inputs = make_inputs(2, 50, use_momentum=mode["use_momentum"], dtype=torch.float64)
    options = {"chunk_size": 16, **arguments_of(mode)}
    assert_same(run(inputs, op=in_parts(*cuts), **options), run(inputs, **options), 1e-10)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 80),
    part=st.floats(0, 1),
    chunk_size=st.integers(1, 40),
    mode=st.sampled_from(OPTIONS),
)
def test_a_sequence_may_be_cut_anywhere(tokens, part, chunk_size, mode):
    cut = min(max(int(part * tokens), 1), tokens - 1)
    inputs = make_inputs(1, tokens, (4, 6, 5), use_momentum=mode["use_momentum"], dtype=torch.float64)
    options = {"chunk_size": chunk_size, **arguments_of(mode)}
    # one pass and two parts agree to rounding; an update of one token (chunk 1) multiplies it up
    assert_same(run(inputs, op=in_parts(cut), **options), run(inputs, **options), 1e-8)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_state_goes_on_with_either_backend(backend):
    inputs = make_inputs(2, 50, dtype=torch.float64)
    expected = run(inputs, backend="reference", chunk_size=16, with_gradients=False)
    other = {"torch": "reference", "reference": "torch"}[backend]
    parts = [
        {n: x if n[0] == "w" else x[:, p] for n, x in inputs.items()} for p in (slice(21), slice(21, 50))
    ]
    rates = [x.pop("momentum") for x in parts]
    first, state = chunk_lact(
        **parts[0], momentum=rates[0], chunk_size=16, output_final_state=True, backend=backend
    )
    assert state.tokens == 5 and state.widths == (16, 24, 12) and state.chunk_size == 16
    second, last = chunk_lact(
        **parts[1],
        momentum=rates[1],
        chunk_size=16,
        initial_state=state,
        output_final_state=True,
        backend=other,
    )
    assert_same({"o": torch.cat([first, second], 1)} | state_tensors(last), expected, 1e-10)


@pytest.mark.parametrize(("tokens", "left"), [(1, 1), (15, 15), (16, 16), (17, 1), (32, 32 - 16), (50, 2)])
def test_the_update_waits_for_the_token_after_it(tokens, left):
    found = run(make_inputs(1, tokens), chunk_size=16, with_gradients=False)
    assert found["open k"].shape[1] == found["open momentum"].shape[1] == left


@MODES
def test_branches_of_a_state(mode):
    """Rows chosen by index, several times: each goes on alone, gradients meet in the parent."""
    inputs = make_inputs(2, 30, use_momentum=mode["use_momentum"], dtype=torch.float64)
    rows = torch.tensor([1, 0, 1, 1])
    after = make_inputs(4, 20, use_momentum=mode["use_momentum"], dtype=torch.float64, seed=5)
    options = {"chunk_size": 16, "output_final_state": True, **arguments_of(mode)}

    def branched(select):
        leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if x is not None}
        ahead = {n: x for n, x in after.items() if n[0] != "w"}
        if select:
            _, state = chunk_lact(**leaves, **options)
            weights = {n: leaves[n][rows] for n in ("w0", "w1", "w2")}
            o, state = chunk_lact(**weights, **ahead, initial_state=state.select(rows), **options)
        else:
            whole = {n: leaves[n][rows] for n in ("w0", "w1", "w2")}
            whole |= {n: torch.cat([leaves[n][rows], ahead[n]], 1) for n in leaves if n[0] != "w"}
            o, state = chunk_lact(**whole, **options)
            o = o[:, 30:]
        outputs = {"o": o} | state_tensors(state)
        return {n: x.detach() for n, x in outputs.items()} | gradients(outputs, leaves)

    assert_same(branched(select=True), branched(select=False), 1e-10)


def test_detached_states_end_the_graph():
    inputs = {n: x.requires_grad_() for n, x in make_inputs(1, 20).items()}
    _, state = chunk_lact(**inputs, chunk_size=16, prenorm=True, output_final_state=True)
    assert all(x.requires_grad for x in state_tensors(state).values())
    detached = state.detach()
    assert isinstance(detached, LaCTState) and detached.tokens == 4
    for name, x in state_tensors(detached).items():
        assert not x.requires_grad and torch.equal(x, state_tensors(state)[name]), name


# --- scan and apply apart ---------------------------------------------------------------------------------

WIDTHS = Widths(6, 8, 5)


def scan_inputs(mode, updates, dtype=torch.float64, chunk_size=8):
    """Weights as they are in the middle of a sequence, norms of their own, tokens of ``updates`` chunks."""
    inputs = make_inputs(
        2, max(updates, 1) * chunk_size, WIDTHS, use_momentum=mode["use_momentum"], dtype=dtype
    )
    random = torch.Generator().manual_seed(3)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    found = {name: inputs[name] for name in TOKENS}
    found["applied"] = WIDTHS.pack(inputs["w0"], inputs["w1"], inputs["w2"])
    found["unnormalised"] = found["applied"] + 0.3 * new(2, WIDTHS.size) if mode["prenorm"] else None
    found["weights.momentum"] = 0.2 * new(2, WIDTHS.size) if mode["use_momentum"] else None
    found["norms"] = new(2, WIDTHS.rows).abs() + 0.2
    return found


def scan(inputs, *, updates, use_muon, backend, chunk_size=8, entries=None):
    """The stacks by name and, from one entry of them or all, every gradient."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items() if x is not None}
    weights = LaCTWeights(leaves["applied"], leaves.get("unnormalised"), leaves.get("weights.momentum"))
    stack = lact_scan(
        weights, leaves["norms"], *(leaves.get(name) for name in TOKENS), widths=WIDTHS, chunk_size=chunk_size,
        updates=updates, use_muon=use_muon, backend=backend,
    )  # fmt: skip
    outputs = dict(zip(("stack", "sums", "steps"), stack.tensors()))
    outputs = {n: x if entries is None else x[:, entries] for n, x in outputs.items() if x is not None}
    return {n: x.detach() for n, x in outputs.items()} | gradients(outputs, leaves)


@pytest.mark.parametrize("entries", [None, 0, 1, 2, 3], ids=lambda x: "all" if x is None else str(x))
@MODES
def test_gradients_through_every_entry_of_a_scan(mode, entries):
    inputs = scan_inputs(mode, updates=3)
    options = {"updates": 3, "use_muon": mode["use_muon"], "entries": entries}
    assert_same(scan(inputs, backend="torch", **options), scan(inputs, backend="reference", **options), 1e-10)


@MODES
def test_a_scan_of_no_updates(mode):
    inputs = scan_inputs(mode, updates=0)
    found = scan(inputs, updates=0, use_muon=mode["use_muon"], backend="torch")
    assert torch.equal(found["stack"][:, 0], inputs["applied"]) and found["stack"].shape[1] == 1
    assert_same(found, scan(inputs, updates=0, use_muon=mode["use_muon"], backend="reference"), 1e-10)


@pytest.mark.parametrize(
    ("offset", "tokens"), [(0, 3), (0, 8), (0, 30), (3, 2), (3, 5), (3, 6), (7, 1), (8, 9), (5, 27), (20, 8)]
)
def test_apply_from_an_offset(offset, tokens):
    """A chunk already begun, whole chunks, a chunk's start."""
    inputs = make_inputs(2, tokens, WIDTHS, dtype=torch.float64)
    entries = (offset + tokens - 1) // 8 + 2  # one entry more than is read
    stack = torch.randn(2, entries, WIDTHS.size, dtype=torch.float64)

    def run_apply(backend):
        leaves = {"stack": stack.clone().requires_grad_(), "q": inputs["q"].clone().requires_grad_()}
        o = lact_apply(**leaves, widths=WIDTHS, chunk_size=8, offset=offset, backend=backend)
        return {"o": o.detach()} | gradients({"o": o}, leaves)

    assert_same(run_apply("torch"), run_apply("reference"), 1e-10)


def test_layout():
    w0, w1, w2 = torch.randn(2, 8, 6), torch.randn(2, 5, 8), torch.randn(2, 8, 6)
    flat = WIDTHS.pack(w0, w1, w2)
    assert flat.shape == (2, WIDTHS.size)
    for ours, theirs in zip(WIDTHS.unpack(flat), (w0, w1, w2)):
        assert torch.equal(ours, theirs)
    rows = torch.cat([w0.norm(dim=-1), w2.norm(dim=-1), w1.norm(dim=-1)], -1)
    assert_close(WIDTHS.row_norms(flat), rows, 1e-6)
    assert_close(WIDTHS.row_dots(flat, flat), rows.square(), 1e-6)
    assert_close(WIDTHS.row_norms(WIDTHS.scale_rows(flat, 1 / rows)), torch.ones_like(rows), 1e-6)


# --- dtypes and layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 6e-3), (torch.float16, 7e-4)], ids=["bf16", "fp16"]
)
@MODES
def test_half_precision_only_rounds_the_outputs(dtype, tolerance, mode):
    """Half-precision q, k, v beside float32 weights and rates: the arithmetic stays in float32."""
    inputs = make_inputs(2, 50, use_momentum=mode["use_momentum"])
    inputs = {n: x.to(dtype) if n in ("q", "k", "v") else x for n, x in inputs.items()}
    options = {"chunk_size": 16, **arguments_of(mode)}
    expected, actual = run(to_double(inputs), backend="reference", **options), run(inputs, **options)
    for name, x in actual.items():
        rounded = name.lstrip("d") in ("o", "q", "k", "v") or name in ("open k", "open v")
        assert x.dtype == (dtype if rounded else torch.float32), name
        exact = 1e-4 if mode["use_muon"] else 1e-5
        # the upstream gradient of o is rounded to the dtype, so all gradients start a rounding apart
        assert_close(x, expected[name], tolerance if name[0] == "d" or rounded else exact, name)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_keeps_states_and_arithmetic_in_float32(backend):
    inputs = make_inputs(2, 50)
    rounded = {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    for grad in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            actual = run(inputs, backend=backend, chunk_size=16, with_gradients=grad)
        expected = run(to_double(rounded), backend="reference", chunk_size=16, with_gradients=grad)
        assert actual["o"].dtype == torch.bfloat16 and actual["weights.applied"].dtype == torch.float32
        for name, x in actual.items():
            # two or three roundings to bfloat16 of 2e-3 each, upstream and downstream
            assert_close(x, expected[name], 1e-5 if name.startswith("weights") else 6e-3, name)


def test_weights_of_another_dtype():
    inputs = make_inputs(2, 50)
    mixed = {n: x.bfloat16() if n in ("w0", "w1", "w2") else x for n, x in inputs.items()}
    actual = run(mixed, chunk_size=16)
    assert actual["dw0"].dtype == torch.bfloat16 and actual["weights.applied"].dtype == torch.float32
    expected = run(to_double(mixed), backend="reference", chunk_size=16)
    for name, x in actual.items():
        assert_close(x, expected[name], 4e-3 if x.dtype == torch.bfloat16 else 1e-5, name)


def test_any_strides():
    inputs = make_inputs(2, 50)
    strided = {
        "w0": inputs["w0"].mT.contiguous().mT,
        "w1": torch.stack([inputs["w1"], inputs["w1"]], -1)[..., 0],
        "w2": inputs["w2"].transpose(0, 1).contiguous().transpose(0, 1),
        "q": inputs["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "k": torch.cat([inputs["k"], inputs["k"]], -1)[..., :16],
        "v": inputs["v"].repeat_interleave(2, -1)[..., ::2],
        "lr0": torch.cat([inputs["lr0"], inputs["lr1"], inputs["lr2"]], -1)[..., :1],
        "lr1": torch.cat([inputs["lr0"], inputs["lr1"], inputs["lr2"]], -1)[..., 1:2],
        "lr2": inputs["lr2"].transpose(0, 1).contiguous().transpose(0, 1),
        "momentum": inputs["momentum"][:, :1].expand(2, 50, 1),
    }
    assert not any(x.is_contiguous() for x in strided.values())
    same = {n: x.contiguous() for n, x in strided.items()}
    assert_same(run(strided, chunk_size=16), run(same, chunk_size=16), 1e-6)


@MODES
def test_inputs_are_never_written(mode):
    inputs = make_inputs(1, 40, use_momentum=mode["use_momentum"])
    before = {n: None if x is None else x.clone() for n, x in inputs.items()}
    run(inputs, chunk_size=16, **arguments_of(mode))
    for name, x in inputs.items():
        assert x is None or torch.equal(x, before[name]), name


# --- before and after the fast weights ---------------------------------------------------------------------


def edge_inputs(*, batch=2, tokens=11, heads=3, width=12, v_width=10, turned=2, dtype=torch.float64):
    """Projections, parameters and angles; the fast weights' and the attention's outputs, norm and gate."""
    random = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)  # noqa: E731
    angle = 3 * new(batch, tokens, turned)
    before = {
        "q": new(batch, tokens, heads * width), "k": new(batch, tokens, heads * width),
        "v": new(batch, tokens, heads * v_width),
        "scale": 1 + new(heads * width, 2), "offset": new(heads * width, 2),
    }  # fmt: skip
    after = {
        "o": new(batch, heads, tokens, v_width), "attended": new(batch, tokens, heads * v_width),
        "weight": new(v_width), "gate": new(batch, tokens, heads),
    }  # fmt: skip
    return before, after, (angle.cos(), angle.sin())


def run_edge(op, inputs, *arguments, **options):
    """Outputs by place, and every gradient."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    found = op(*leaves.values(), *arguments, **options)
    outputs = {f"output {i}": x for i, x in enumerate(found if isinstance(found, tuple) else (found,))}
    return {name: x.detach() for name, x in outputs.items()} | gradients(outputs, leaves)


def prepare_by_complex_numbers(q, k, v, scale, offset, angles, *, num_heads, silu=True, v_silu=True):
    """The same as lact_prepare: pairs of channels as complex numbers, each turned by its angle."""

    def transform(x, j):
        x = x * scale[:, j] + offset[:, j]
        x = (F.silu(x) if silu else x).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        x = x / (x.square().sum(-1, keepdim=True).sqrt() + 1e-5)
        if angles is None:
            return x
        turn = torch.complex(*angles)[:, None, :, None]
        a, b = x.unflatten(-1, (-1, 2, turn.shape[-1])).unbind(-2)
        z = torch.complex(a, b) * turn
        return torch.stack([z.real, z.imag], -2).flatten(-3)

    v = (F.silu(v) if v_silu else v).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    return transform(q, 0), transform(k, 1), v


@pytest.mark.parametrize("turned", [None, 1, 2, 6])
@pytest.mark.parametrize(("silu", "v_silu"), [(True, True), (True, False), (False, False)])
def test_prepare(turned, silu, v_silu):
    before, _, angles = edge_inputs(turned=turned or 1)
    arguments = (None if turned is None else angles,)
    options = {"num_heads": 3, "silu": silu, "v_silu": v_silu}
    expected = run_edge(prepare_by_complex_numbers, before, *arguments, **options)
    found = run_edge(lact_prepare, before, *arguments, backend="torch", **options)
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_finish(gated):
    _, after, _ = edge_inputs()
    if not gated:
        del after["gate"]

    def plainly(o, attended, weight, gate=None):
        y = F.rms_norm(o, (10,), weight, eps=1e-5)
        y = y if gate is None else y * F.silu(gate).transpose(1, 2)[..., None]
        return attended + y.transpose(1, 2).flatten(-2)

    arguments = () if gated else (None,)
    found = run_edge(lact_finish, after, *arguments, backend="torch")
    assert_same(found, run_edge(plainly, after, *arguments), 1e-12)


def test_edges_round_once():
    before, after, angles = edge_inputs(dtype=torch.bfloat16)
    options = {"num_heads": 3, "backend": "torch"}
    exact = lact_prepare(*to_double(before).values(), tuple(x.double() for x in angles), **options)
    for x, y in zip(lact_prepare(*before.values(), angles, **options), exact):
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        assert torch.equal(x, y.bfloat16()) or relative_error(x, y) < 2.5e-3
    o = lact_finish(*after.values(), backend="torch")
    assert o.dtype == torch.bfloat16
    assert_close(o, lact_finish(*to_double(after).values(), backend="torch"), 2.5e-3)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("q must be [B, T, heads * width] of a float dtype with 3 heads, got [2, 11, 35]", {"q": slice(35)}),
        ("k must have q's shape [2, 11, 36], got [2, 11, 33]", {"k": slice(33)}),
        ("v must have q's dtype torch.float64, got torch.float32", {"v": torch.float32}),
        ("scale must be [H D, 2] = [36, 2], got [36, 1]", {"scale": slice(1)}),
        (
            "angles' cosines must be [B, T, R] = [2, 11, R] with 2 R dividing 12, got [2, 11, 4]",
            {"turned": 4},
        ),
        ("backend must be one of triton, torch", {"backend": "reference"}),
    ],
)
def test_bad_arguments_of_prepare_are_named(message, changed):
    before, _, angles = edge_inputs(turned=changed.pop("turned", 2))
    backend = changed.pop("backend", None)
    for name, change in changed.items():
        before[name] = before[name][..., change] if isinstance(change, slice) else before[name].to(change)
    with pytest.raises(ValueError) as error:
        lact_prepare(*before.values(), angles, num_heads=3, backend=backend)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "name", "shape"),
    [
        ("o must be [B, H, T, V] of a float dtype, got [3, 11, 10]", "o", (3, 11, 10)),
        ("attended must be [B, T, H V] = [2, 11, 30] of torch.float64", "attended", (2, 11, 20)),
        ("weight must be [V] = [10], got [9]", "weight", (9,)),
        ("gate must be [B, T, H] = [2, 11, 3], got [2, 3, 11]", "gate", (2, 3, 11)),
    ],
)
def test_bad_arguments_of_finish_are_named(message, name, shape):
    _, after, _ = edge_inputs()
    with pytest.raises(ValueError) as error:
        lact_finish(**after | {name: torch.ones(shape, dtype=torch.float64)})
    assert message in str(error.value)


# --- memory -----------------------------------------------------------------------------------------------


def saved_bytes(chunks):
    """What one call of the 760M layer's op keeps for its backward: every storage once."""
    widths = Widths(384, 384, 384)
    rows, tokens, bf16 = 4, chunks * 2048, torch.bfloat16
    new = lambda *shape, **kwargs: torch.full(shape, 0.05, **kwargs).requires_grad_()  # noqa: E731
    weights = [new(rows, 384, 384) for _ in range(3)]
    tokens = [new(rows, tokens, 384, dtype=bf16) for _ in range(3)] + [new(rows, tokens, 1) for _ in range(4)]
    kept = {}

    def keep(x):
        if all(x.untyped_storage().data_ptr() != w.untyped_storage().data_ptr() for w in weights):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o = chunk_lact(*weights, *tokens[:6], momentum=tokens[6], chunk_size=2048, backend="torch")
    assert o.requires_grad and widths.size == 442368
    return sum(kept.values())


def test_activation_memory_at_760m_shapes():
    """At most 40 MB for each updated chunk and layer, inputs and the state's own copies included."""
    two, three = saved_bytes(2), saved_bytes(3)
    assert 25e6 < three - two <= 40e6  # not less than k, v and one state: the hooks saw them


# --- torch.library and torch.compile ----------------------------------------------------------------------


def op_arguments(mode, requires_grad=True):
    inputs = scan_inputs(mode, updates=2, dtype=torch.float32)
    names = ("applied", "unnormalised", "weights.momentum", "norms", *TOKENS)
    leaves = [None if inputs[n] is None else inputs[n].requires_grad_(requires_grad) for n in names]
    return [*leaves, list(WIDTHS), 8, 2, mode["use_muon"], "torch"]


@MODES
def test_opcheck_of_the_scan(mode):
    torch.library.opcheck(lact_op._scan_op, tuple(op_arguments(mode)))


@pytest.mark.parametrize("upstream", ["all", "stack", "sums"])
def test_opcheck_of_the_backward_of_the_scan(upstream):
    mode = {"use_momentum": upstream != "stack", "use_muon": False, "prenorm": upstream != "stack"}
    arguments = op_arguments(mode, requires_grad=False)
    stack, sums, steps, divisors = lact_op._scan_op(*arguments)
    d_sums, d_steps = sums if mode["prenorm"] else None, steps if upstream == "all" else None
    given = (stack if upstream != "sums" else None, d_sums, d_steps)
    torch.library.opcheck(
        lact_op._scan_backward_op,
        (stack, steps, divisors, *arguments[3:10], *given, list(WIDTHS), 8, False, mode["prenorm"], "torch"),
    )


@pytest.mark.parametrize("offset", [0, 5])
def test_opcheck_of_apply(offset):
    stack, q, d_o = torch.randn(2, 3, WIDTHS.size), torch.randn(2, 19, 6), torch.randn(2, 19, 5)
    options = (list(WIDTHS), 8, offset, "torch")
    torch.library.opcheck(lact_op._apply_backward_op, (stack, q, d_o, *options))
    torch.library.opcheck(lact_op._apply_op, (stack.requires_grad_(), q.requires_grad_(), *options))


@pytest.mark.parametrize("mode", OPTIONS[::2] + OPTIONS[-1:], ids=str)
def test_compiles_to_one_graph(mode):
    def loss(*inputs):
        o, state = chunk_lact(
            *inputs[:9], momentum=inputs[9] if mode["use_momentum"] else None, chunk_size=16,
            output_final_state=True, **arguments_of(mode),
        )  # fmt: skip
        ahead = (x[:, :20] for x in inputs[3:9])
        rates = inputs[9][:, :20] if mode["use_momentum"] else None
        more = chunk_lact(
            *inputs[:3], *ahead, momentum=rates, chunk_size=16, initial_state=state, **arguments_of(mode)
        )
        return o.square().sum() + more.sum()

    inputs = make_inputs(1, 40, (4, 6, 5), use_momentum=mode["use_momentum"])
    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name, a, b in zip(NAMES, torch.autograd.grad(compiled(*leaves), leaves), expected):
        assert_close(a, b, 1e-5, name)


# --- what is refused --------------------------------------------------------------------------------------


def bad_calls():
    x = make_inputs(2, 20, (6, 8, 5))
    rest = {n: a for n, a in x.items() if n not in ("q", "k", "v")}

    def state(**changed):
        options = {"chunk_size": 16, "output_final_state": True} | changed
        return chunk_lact(
            **(x | {n: a for n, a in changed.items() if n == "momentum"}),
            **({n: a for n, a in options.items() if n != "momentum"}),
        )[1]

    def go_on(initial_state, **changed):
        return x | {"chunk_size": 16, "initial_state": initial_state} | changed

    other_widths = chunk_lact(**make_inputs(2, 20, (6, 8, 7)), output_final_state=True, chunk_size=16)[1]
    return {
        "w0 must be [N, dh, dk], got [8, 6]": x | {"w0": x["w0"][0]},
        "w2 must have w0's shape [2, 8, 6], got [2, 8, 5]": x | {"w2": x["w2"][..., :5]},
        "w1 must be [N, dv, dh] with w0's N, dh = [2, 8], got [2, 5, 7]": x | {"w1": x["w1"][..., :7]},
        "w1 must be [N, dv, dh] with w0's N, dh = [2, 8], got [1, 5, 8]": x | {"w1": x["w1"][:1]},
        "w0 must have a floating-point dtype, got torch.int64": x | {"w0": x["w0"].long()},
        "w2 must be on w0's device cpu, got meta": x | {"w2": x["w2"].to("meta")},
        "q must be [N, L, dk] with N = 2, L >= 1, dk = 6, got [2, 20, 4]": x | {"q": x["q"][..., :4]},
        "q must be [N, L, dk] with N = 2, L >= 1, dk = 6, got [2, 0, 6]": x | {"q": x["q"][:, :0]},
        "q must have one of the dtypes": x | {"q": x["q"].long()},
        "q must be on the weights' device cpu, got meta": x | {"q": x["q"].to("meta")},
        "k must be [N, L, dk] with N = 2, L >= 1, dk = 6, got [1, 20, 6]": x | {"k": x["k"][:1]},
        "k must have q's shape [2, 20, 6] and dtype torch.float32, got [2, 19, 6]": rest
        | {"q": x["q"], "k": x["k"][:, :19], "v": x["v"][:, :19]}
        | {n: x[n][:, :19] for n in ("lr0", "lr1", "lr2", "momentum")},
        "k must have q's shape [2, 20, 6] and dtype torch.float32, got [2, 20, 6], torch.bfloat16": x
        | {"k": x["k"].bfloat16(), "v": x["v"].bfloat16()},
        "v must be [N, L, dv] = [2, 20, 5], got [2, 20, 6]": x | {"v": x["k"]},
        "v must have k's dtype torch.float32, got torch.float16": x | {"v": x["v"].half()},
        "v must be on k's device cpu, got meta": x | {"v": x["v"].to("meta")},
        "lr0 must be [N, L, 1] = [2, 20, 1], got [2, 20]": x | {"lr0": x["lr0"][..., 0]},
        "lr2 must have a floating-point dtype, got torch.int32": x | {"lr2": x["lr2"].int()},
        "lr1 must be on k's device cpu, got meta": x | {"lr1": x["lr1"].to("meta")},
        "momentum must be [N, L, 1] = [2, 20, 1], got [2, 20, 2]": x
        | {"momentum": x["momentum"].expand(2, 20, 2)},
        "chunk_size must be a whole number of at least 1, got 0": x | {"chunk_size": 0},
        "chunk_size must be a whole number of at least 1, got -3": x | {"chunk_size": -3},
        "chunk_size must be a whole number of at least 1, got 2.0": x | {"chunk_size": 2.0},
        "backend must be one of": x | {"backend": "cuda"},
        "initial_state must be a LaCTState or None, got tuple": go_on((x["w0"],)),
        "its momentum is True, expected False": go_on(state(), momentum=None),
        "its momentum is False, expected True": go_on(state(momentum=None)),
        "its chunk_size is 16, expected 8": go_on(state(), chunk_size=8),
        "its prenorm is False, expected True": go_on(state(), prenorm=True),
        "its prenorm is True, expected False": go_on(state(prenorm=True)),
        "its widths (dk, dh, dv) is (6, 8, 7), expected (6, 8, 5)": go_on(other_widths),
        "its rows is 1, expected 2": go_on(state().select(torch.tensor([0]))),
        "its dtype is torch.float32, expected torch.float64": go_on(
            state(), **{n: a.double() for n, a in x.items()}
        ),
    }


@pytest.mark.parametrize("message", bad_calls())
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_bad_arguments_are_named(message, backend):
    arguments = {"backend": backend} | bad_calls()[message]
    with pytest.raises(ValueError) as error:
        chunk_lact(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("k must have 3 x 8 tokens for as many updates, got 16", {"updates": 3}),
        ("weights.applied must be [2, 136] of torch.float32, got [2, 135]", {"applied": torch.ones(2, 135)}),
        ("weights.unnormalised must be [2, 136] of torch.float32, got", {"unnormalised": torch.ones(1, 136)}),
        ("norms must be [2, 21] of torch.float32, got [2, 20]", {"norms": torch.ones(2, 20)}),
        ("momentum's rates and weights.momentum belong together", {"momentum": None}),
        ("momentum's rates and weights.momentum belong together", {"weights.momentum": None}),
        ("chunk_size must be a whole number of at least 1, got 0", {"chunk_size": 0}),
    ],
)
def test_bad_arguments_of_a_scan_are_named(message, changed):
    mode = {"use_momentum": True, "use_muon": False, "prenorm": True}
    x = scan_inputs(mode, updates=2, dtype=torch.float32) | {"updates": 2, "chunk_size": 8} | changed
    weights = LaCTWeights(x["applied"], x["unnormalised"], x["weights.momentum"])
    with pytest.raises(ValueError) as error:
        lact_scan(
            weights, x["norms"], *(x[n] for n in TOKENS), widths=WIDTHS, chunk_size=x["chunk_size"],
            updates=x["updates"],
        )  # fmt: skip
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (
            "stack must be [N, S, P] with S >= 3 and P = 136, got [2, 2, 136]",
            {"stack": torch.ones(2, 2, 136)},
        ),
        ("stack must be [N, S, P] with S >= 4 and P = 136, got [2, 3, 136]", {"offset": 9}),
        (
            "stack must be [N, S, P] with S >= 3 and P = 136, got [2, 3, 135]",
            {"stack": torch.ones(2, 3, 135)},
        ),
        ("q must be [N, L, dk] with N = 2, L >= 1, dk = 6, got [2, 19, 7]", {"q": torch.ones(2, 19, 7)}),
        ("chunk_size must be a whole number of at least 1, got 0", {"chunk_size": 0}),
    ],
)
def test_bad_arguments_of_apply_are_named(message, changed):
    x = {"stack": torch.ones(2, 3, 136), "q": torch.ones(2, 19, 6), "chunk_size": 8} | changed
    with pytest.raises(ValueError) as error:
        lact_apply(**x, widths=WIDTHS)
    assert message in str(error.value)


@pytest.mark.parametrize("mode", [OPTIONS[0], OPTIONS[-1]], ids=["plain", "all"])
def test_gradcheck(mode):
    """The written-out backward against finite differences, apart from the reference."""
    inputs = make_inputs(1, 8, (2, 3, 2), use_momentum=mode["use_momentum"], dtype=torch.float64)

    def op(*inputs):
        o, state = chunk_lact(
            *inputs[:9], momentum=inputs[9] if mode["use_momentum"] else None, chunk_size=3,
            output_final_state=True, **arguments_of(mode),
        )  # fmt: skip
        return o, *(x for x in state.weights.tensors() if x is not None)

    leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
