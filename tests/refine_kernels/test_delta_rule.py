"""The delta rule against its definition: every output and every gradient, every way of calling it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from refine_kernels.delta_rule import chunk_delta_rule, chunked, recurrent_delta_rule
from refine_kernels.delta_rule.op import _chunk_op
from tests.numerics import assert_close, relative_error

NAMES = ("q", "k", "v", "beta", "g", "initial_state")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors here are small: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_inputs(rows, tokens, heads, kd, vd, *, gated=True, states=None, dtype=torch.float32, seed=0):
    """Inputs as a model makes them: unit keys, beta in (0, 1), decays of a few per cent to a third."""
    random = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    inputs = {
        "q": new(rows, tokens, heads, kd),
        "k": F.normalize(new(rows, tokens, heads, kd), dim=-1),
        "v": new(rows, tokens, heads, vd),
        "beta": new(rows, tokens, heads).sigmoid(),
        "g": F.logsigmoid(new(rows, tokens, heads) + 2) if gated else None,
        "initial_state": new(rows if states is None else states, heads, kd, vd),
    }
    inputs = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    if dtype not in (torch.float32, torch.float64):
        inputs["initial_state"] = inputs["initial_state"].float()
    return inputs


def to_double(inputs):
    return {name: None if x is None else x.double() for name, x in inputs.items()}


def run(
    inputs, op=chunk_delta_rule, *, through=("o", "final_state", "states"), with_gradients=True, **options
):
    """Outputs by name, and the gradients ("dq", ...) that fixed random weights on ``through`` send back."""
    leaves = {name: x.detach().requires_grad_(with_gradients) for name, x in inputs.items() if x is not None}
    positional = [leaves[name] for name in NAMES[:4]]
    options = {"output_final_state": True, **options, "initial_state": leaves.get("initial_state")}
    outputs = op(*positional, g=leaves.get("g"), **options)
    named = {name: x for name, x in zip(("o", "final_state", "states"), outputs) if x is not None}
    if not with_gradients:
        return named
    random = torch.Generator().manual_seed(1)
    # of bfloat16's precision, so that the same gradients arrive whatever the dtype of the outputs
    weights = {name: torch.randn(x.shape, generator=random).bfloat16() for name, x in named.items()}
    used = [name for name in named if name in through]
    gradients = torch.autograd.grad(
        [named[name] for name in used], list(leaves.values()),
        [weights[name].to(named[name]) for name in used], allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return {
        **{name: x.detach() for name, x in named.items()},
        **{f"d{n}": d for n, d in zip(leaves, gradients)},
    }


def sizes_before_norm(inputs, *, use_qk_l2norm_in_kernel=False, **options):
    """Norms of dq and dk before the unit norm takes out what lies along q and k, which may be most of it."""
    if not use_qk_l2norm_in_kernel:
        return {}
    inputs = to_double(inputs)
    lengths = {name: inputs[name].norm(dim=-1, keepdim=True) for name in ("q", "k")}
    unit = {name: inputs[name] / length for name, length in lengths.items()}
    gradients = run(inputs | unit, backend="reference", **options)
    return {f"d{name}": (gradients[f"d{name}"] / length).norm().item() for name, length in lengths.items()}


def assert_same(actual, expected, tolerance, sizes=None):
    """Errors relative to the norm of what is expected, or to one of ``sizes`` if that is larger."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        size, larger = value.double().norm().item(), (sizes or {}).get(name, 0.0)
        assert_close(actual[name], value, tolerance * max(1.0, larger / max(size, 1e-30)), name)


# --- parity with the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 63, 64, 65, 100, 257])
def test_lengths(tokens, gated, dtype):
    inputs = make_inputs(2, tokens, 2, 16, 24, gated=gated, dtype=dtype)
    expected = run(to_double(inputs), backend="reference", state_stride=64)
    assert_same(run(inputs, backend="torch", state_stride=64), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("kd", "vd"), [(16, 128), (60, 60), (64, 64), (96, 60), (128, 96), (128, 256), (3, 1)]
)
def test_head_sizes(kd, vd, gated):
    inputs = make_inputs(1, 100, 2, kd, vd, gated=gated)
    options = {"state_stride": 64, "use_qk_l2norm_in_kernel": True}
    expected = run(to_double(inputs), backend="reference", **options)
    assert_same(run(inputs, backend="torch", **options), expected, 1e-5)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("blocks", [1, 6, 12, 1000])
def test_segments_of_every_size(blocks, gated, monkeypatch):
    """From one chunk a segment to all of them in one."""
    monkeypatch.setattr(chunked, "SEGMENT_BLOCKS", blocks)
    inputs = make_inputs(2, 300, 3, 8, 4, gated=gated)
    expected = run(to_double(inputs), backend="reference", state_stride=128)
    assert_same(run(inputs, backend="torch", state_stride=128), expected, 1e-5)


@pytest.mark.parametrize("through", [("o",), ("final_state",), ("states",), ("o", "states")], ids="+".join)
@pytest.mark.parametrize("tokens", [5, 200])
def test_gradients_from_any_output(tokens, through):
    inputs = make_inputs(2, tokens, 3, 16, 8)
    expected = run(to_double(inputs), backend="reference", state_stride=64, through=through)
    assert_same(run(inputs, backend="torch", state_stride=64, through=through), expected, 1e-5)


def test_options_left_out():
    """No decay, no initial state, no final state: two outputs, the second None."""
    inputs = make_inputs(2, 70, 2, 16, 16, gated=False) | {"initial_state": None}
    expected = run(to_double(inputs), backend="reference", scale=0.3)
    assert_same(run(inputs, backend="torch", scale=0.3), expected, 1e-5)
    o, final_state = chunk_delta_rule(*(inputs[name] for name in NAMES[:4]))
    assert final_state is None and o.shape == inputs["v"].shape
    assert_same(
        run(inputs, output_final_state=False),
        run(to_double(inputs), backend="reference", output_final_state=False),
        1e-5,
    )


def test_no_rows():
    """A batch of branches may be empty."""
    outputs = run(make_inputs(0, 5, 2, 8, 4), state_stride=64)
    assert outputs["states"].shape == (0, 1, 2, 8, 4) and outputs["dq"].shape == (0, 5, 2, 8)
    with torch.no_grad():
        token = run(make_inputs(0, 1, 2, 8, 4), recurrent_delta_rule, with_gradients=False)
    assert token["o"].shape == (0, 1, 2, 4)


@pytest.mark.parametrize(
    "frozen", [{"q", "k"}, {"v", "beta", "g"}, {"initial_state"}], ids=lambda x: "+".join(sorted(x))
)
def test_some_inputs_without_gradient(frozen):
    inputs = make_inputs(1, 70, 2, 16, 16)
    leaves = {name: x.clone().requires_grad_(name not in frozen) for name, x in inputs.items()}
    o, _ = chunk_delta_rule(
        *(leaves[n] for n in NAMES[:4]), g=leaves["g"], initial_state=leaves["initial_state"]
    )
    o.square().sum().backward()
    for name, x in leaves.items():
        assert (x.grad is None) == (name in frozen), name


# --- states at strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [64, 256])
def test_states_are_those_of_prefix_runs(stride):
    inputs = make_inputs(2, 520, 2, 16, 16)
    states = run(inputs, state_stride=stride, with_gradients=False)["states"]
    assert states.shape == (2, -(-520 // stride), 2, 16, 16) and states.dtype == torch.float32
    assert torch.equal(states[:, 0], inputs["initial_state"])
    for j in range(1, states.shape[1]):
        prefix = {n: x if n == "initial_state" else x[:, : j * stride] for n, x in inputs.items()}
        assert_close(states[:, j], run(prefix, with_gradients=False)["final_state"], 1e-6, f"state {j}")


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(2, 200),
    part=st.floats(0, 1),
    gated=st.booleans(),
    l2norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_sequence_may_be_cut_anywhere(tokens, part, gated, l2norm, seed):
    cut = min(max(int(part * tokens), 1), tokens - 1)
    inputs = make_inputs(1, tokens, 2, 8, 8, gated=gated, dtype=torch.float64, seed=seed)

    def in_two(q, k, v, beta, *, g, initial_state, **options):
        parts = [slice(0, cut), slice(cut, tokens)]
        outputs, state = [], initial_state
        for p in parts:
            x = (a[:, p] for a in (q, k, v, beta))
            o, state = chunk_delta_rule(*x, g=None if g is None else g[:, p], initial_state=state, **options)
            outputs.append(o)
        return torch.cat(outputs, 1), state

    options = {"use_qk_l2norm_in_kernel": l2norm}
    assert_same(run(inputs, in_two, **options), run(inputs, **options), 1e-10)


# --- packed sequences -------------------------------------------------------------------------------------

LENGTHS = (1, 15, 64, 0, 65, 0, 200, 0)


def packed(lengths=LENGTHS, **options):
    inputs = make_inputs(1, sum(lengths), 2, 16, 8, states=len(lengths), **options)
    return inputs, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packed_parity(dtype, gated):
    inputs, cu_seqlens = packed(gated=gated, dtype=dtype)
    options = {"cu_seqlens": cu_seqlens, "state_stride": 64, "use_qk_l2norm_in_kernel": True}
    actual = run(inputs, backend="torch", **options)
    assert_same(actual, run(to_double(inputs), backend="reference", **options), TOLERANCE[dtype])
    assert actual["states"].shape == (len(LENGTHS), 4, 2, 16, 8)
    for n, length in enumerate(LENGTHS):
        assert actual["states"][n, -(-length // 64) :].count_nonzero() == 0
        if length == 0:
            assert torch.equal(actual["final_state"][n], inputs["initial_state"][n])


@pytest.mark.parametrize("lengths", [(33,) * 5, (0, 0, 3), (700,), (31, 500, 32)], ids=str)
def test_packed_lengths(lengths):
    inputs, cu_seqlens = packed(lengths)
    expected = run(to_double(inputs), backend="reference", cu_seqlens=cu_seqlens)
    assert_same(run(inputs, cu_seqlens=cu_seqlens), expected, 1e-5)


def test_packed_equals_rows():
    inputs = make_inputs(3, 100, 2, 16, 16)
    flat = {n: x if n == "initial_state" else x.flatten(0, 1).unsqueeze(0) for n, x in inputs.items()}
    expected, actual = run(inputs), run(flat, cu_seqlens=torch.tensor([0, 100, 200, 300], dtype=torch.int32))
    assert_same({n: x.view(expected[n].shape) for n, x in actual.items()}, expected, 1e-6)


@pytest.mark.parametrize("poisoned", range(4))
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_packed_sequences_do_not_see_one_another(backend, poisoned):
    lengths = (40, 65, 7, 33)
    inputs, cu_seqlens = packed(lengths)
    options = {"cu_seqlens": cu_seqlens, "state_stride": 64, "backend": backend}
    clean = run(inputs, **options)
    for name, x in inputs.items():
        if name == "initial_state":
            x[poisoned] = torch.nan
        else:
            x[:, cu_seqlens[poisoned] : cu_seqlens[poisoned + 1]] = torch.nan
    dirty = run(inputs, **options)
    for name, x in dirty.items():
        for n in range(len(lengths)):
            if name in ("final_state", "states", "dinitial_state"):
                ours, theirs = x[n], clean[name][n]
            else:
                ours, theirs = (a[:, cu_seqlens[n] : cu_seqlens[n + 1]] for a in (x, clean[name]))
            if n == poisoned:
                assert not ours.isfinite().all(), name
            else:
                assert torch.equal(ours, theirs), name


# --- dtypes and layouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)], ids=["bf16", "fp16"]
)
def test_half_precision_only_rounds_the_outputs(dtype, tolerance, gated):
    inputs = make_inputs(1, 150, 2, 32, 16, gated=gated, dtype=dtype)
    options = {"state_stride": 64, "use_qk_l2norm_in_kernel": True}
    expected, actual = run(to_double(inputs), backend="reference", **options), run(inputs, **options)
    for name, x in actual.items():
        state = "state" in name
        assert x.dtype == (torch.float32 if state else dtype), name
        assert_close(x, expected[name], 1e-5 if name in ("final_state", "states") else tolerance, name)


def test_float32_gates_beside_bfloat16_tokens():
    inputs = make_inputs(1, 70, 2, 16, 16)
    mixed = {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    expected, actual = run(to_double(mixed), backend="reference"), run(mixed)
    assert actual["dbeta"].dtype == actual["dg"].dtype == torch.float32
    assert_same(actual, expected, 4e-3)


def test_growth():
    """A gate that grows by e^82 in 64 tokens: what stands above the diagonal overflows and must not count."""
    inputs = make_inputs(1, 64, 1, 16, 16)
    inputs["g"] = torch.full((1, 64, 1), 82 / 63)
    inputs["k"] *= 1e-3  # states that stay small beside what they grow by
    assert_same(run(inputs), run(to_double(inputs), backend="reference"), 1e-5)


@pytest.mark.parametrize("tokens", [1, 40])
def test_autocast_keeps_states_and_arithmetic_in_float32(tokens):
    """What is not rounded to bfloat16 at the end is exact to float32, in the backward under autocast too."""
    inputs = make_inputs(1, tokens, 2, 32, 16)
    for op in (chunk_delta_rule, recurrent_delta_rule):
        for grad in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
                actual = run(inputs, op, backend="torch", with_gradients=grad)
            assert_rounded_once(actual, inputs, with_gradients=grad)


@pytest.mark.parametrize("tokens", [1, 40])
def test_autocast_around_the_reference(tokens):
    """Its backward is PyTorch's own, which takes autocast as it finds it: it runs outside, as it should."""
    inputs = make_inputs(1, tokens, 2, 32, 16)
    for op in (chunk_delta_rule, recurrent_delta_rule):

        def under_autocast(*args, op=op, **options):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return op(*args, **options)

        assert_rounded_once(run(inputs, under_autocast, backend="reference"), inputs)


def assert_rounded_once(actual, inputs, **options):
    """Equal to float64 on tokens that autocast has rounded: to float32's precision, or bfloat16's of the result."""
    rounded = {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    expected = run(to_double(rounded), **options)
    assert actual["o"].dtype == torch.bfloat16 and actual["final_state"].dtype == torch.float32
    for name, x in actual.items():
        assert_close(x, expected[name], 4e-3 if name in ("o", "dq", "dk", "dv") else 1e-5, name)


def test_any_strides():
    inputs = make_inputs(2, 70, 3, 16, 8)
    strided = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([inputs["k"], inputs["k"]], -1)[..., :16],
        "v": inputs["v"].repeat_interleave(2, -1)[..., ::2],
        "beta": inputs["beta"].mT.contiguous().mT,
        "g": inputs["g"].flip(1).contiguous().flip(1)[:, :],
        "initial_state": inputs["initial_state"].mT.contiguous().mT,
    }
    assert not any(x.is_contiguous() for n, x in strided.items() if n != "g")
    assert_same(run(strided, state_stride=64), run(inputs, state_stride=64), 1e-6)
    one = {n: x if n == "initial_state" else x[:, :1] for n, x in strided.items()}
    same = {n: x if n == "initial_state" else x[:, :1] for n, x in inputs.items()}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            actual = run(one, recurrent_delta_rule, with_gradients=grad)
            assert_same(actual, run(same, recurrent_delta_rule, with_gradients=grad), 1e-6)


# --- edges of stability -----------------------------------------------------------------------------------


def edge(name, tokens=150):
    inputs = make_inputs(1, tokens, 2, 16, 16, gated=name.startswith("decay"), dtype=torch.float64)
    match name.split("=")[0]:
        case "beta":
            inputs["beta"] = torch.full_like(inputs["beta"], float(name.split("=")[1]))
        case "parallel keys":
            inputs["k"] = F.normalize(inputs["k"][:, :1] + 1e-3 * inputs["k"], dim=-1)
            inputs["beta"] = torch.full_like(inputs["beta"], float(name.split("=")[1]))
        case "decay":
            inputs["g"] = torch.full_like(inputs["g"], float(name.split("=")[1]))
        case "decay now and then":
            inputs["g"][:, ::7] = float(name.split("=")[1])
    return {n: None if x is None else x.float() for n, x in inputs.items()}


def growth(name):
    """The largest sum of a row of |M|: a rounding of R or dU comes back that many times. For parallel keys
    ``M_ij = -beta (1 - beta)^(i - j - 1)``."""
    if not name.startswith("parallel keys"):
        return 1.0
    beta = float(name.split("=")[1])
    return 1 + beta / (1 - abs(1 - beta))


@pytest.mark.parametrize(
    "name",
    [
        *("beta=0", "beta=1e-6", "beta=1", "beta=1.999", "beta=2"),
        *("parallel keys=0.5", "parallel keys=1", "parallel keys=1.9"),
        *("decay=0", "decay=-20", "decay=-1000", "decay now and then=-50", "decay now and then=-5000"),
        "decay now and then=-inf",
    ],
)
def test_stability_edges(name):
    """At most a few times what the sequential rule itself loses in float32, and what M magnifies a rounding."""
    inputs = edge(name)
    expected = run(to_double(inputs), backend="reference", state_stride=64)
    plain = run(inputs, backend="reference", state_stride=64)
    actual = run(inputs, backend="torch", state_stride=64)
    for key, x in expected.items():
        allowed = max(1e-5, 1e-6 * growth(name)) + 4 * relative_error(plain[key], x)
        if x.norm() < 1e-6 * expected["dv"].norm():  # a gradient that the decay has put out: small, not exact
            assert actual[key].norm() < 1e-6 * expected["dv"].norm(), key
        else:
            assert_close(actual[key], x, allowed, key)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_long_sequence_in_float32(gated):
    inputs = make_inputs(1, 16384, 1, 16, 16, gated=gated)
    inputs["beta"] *= 2
    with torch.no_grad():
        expected = run(to_double(inputs), backend="reference", with_gradients=False)
    actual, double = run(inputs), run(to_double(inputs))
    assert_same({n: double[n] for n in expected}, expected, 1e-10)
    assert_same(actual, double, 1e-5)


# --- decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
def test_recurrent_parity(tokens, gated, grad):
    inputs = make_inputs(6, tokens, 2, 16, 24, gated=gated)
    options = {"use_qk_l2norm_in_kernel": tokens != 2}
    with torch.set_grad_enabled(grad):
        actual = run(inputs, recurrent_delta_rule, with_gradients=grad, **options)
        chunked = run(inputs, with_gradients=grad, **options)
    expected = run(
        to_double(inputs), recurrent_delta_rule, with_gradients=grad, backend="reference", **options
    )
    assert_same(actual, expected, 1e-5)
    assert_same(chunked, expected, 1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_state_indices_copy_on_write(tokens, grad):
    inputs = make_inputs(5, tokens, 2, 8, 8, states=3)
    indices = torch.tensor([2, 0, 2, 2, 1], dtype=torch.int32)
    before = inputs["initial_state"].clone()
    with torch.set_grad_enabled(grad):
        actual = run(inputs, recurrent_delta_rule, with_gradients=grad, state_indices=indices)
        expected = run(
            to_double(inputs),
            recurrent_delta_rule,
            with_gradients=grad,
            state_indices=indices,
            backend="reference",
        )
    assert_same(actual, expected, 1e-5)
    assert torch.equal(inputs["initial_state"], before)


def test_one_token_without_a_state():
    inputs = make_inputs(3, 1, 2, 8, 4) | {"initial_state": None}
    with torch.no_grad():
        actual = run(inputs, recurrent_delta_rule, with_gradients=False)
    assert_same(actual, run(inputs, backend="reference", with_gradients=False), 1e-6)


# --- torch.library and torch.compile ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "plain", "packed"])
def test_opcheck(kind):
    if kind == "packed":
        inputs, cu_seqlens = packed((3, 0, 70))
    else:
        inputs, cu_seqlens = make_inputs(2, 70, 2, 8, 4, gated=kind != "plain"), None
    if kind == "plain":
        inputs["initial_state"] = None
    leaves = [None if inputs[n] is None else inputs[n].requires_grad_() for n in NAMES]
    whole = kind != "plain"
    torch.library.opcheck(_chunk_op, (*leaves, cu_seqlens, 0.3, True, whole, 64 * whole, True, "torch"))


def test_compiles_to_one_graph():
    def loss(q, k, v, beta, g, initial_state):
        o, final_state, states = chunk_delta_rule(
            q, k, v, beta, g=g, initial_state=initial_state, output_final_state=True, state_stride=64
        )
        with torch.no_grad():
            token, _ = recurrent_delta_rule(
                q[:, :1], k[:, :1], v[:, :1], beta[:, :1], initial_state=initial_state
            )
        return o.square().sum() + final_state.sum() + states.square().sum() + token.sum()

    leaves = [x.requires_grad_() for x in make_inputs(1, 70, 2, 8, 4).values()]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for name, a, b in zip(NAMES, actual, expected):
        assert_close(a, b, 1e-6, name)


# --- what is refused --------------------------------------------------------------------------------------


def bad_calls():
    x = make_inputs(2, 70, 2, 8, 4)
    one = {n: a[:1] for n, a in x.items()}
    bounds = torch.tensor
    return {
        "q must be [B, T, H, K]": x | {"q": x["q"][0]},
        "q must be [B, T, H, K] with T >= 1": {
            n: a if n == "initial_state" else a[:, :0] for n, a in x.items()
        },
        "q must have one of the dtypes": {n: a.int() for n, a in x.items()},
        "k must have q's shape": x | {"k": x["k"][..., :4]},
        "v must be [B, T, H, V]": x | {"v": x["v"][:, :5]},
        "k must have q's dtype torch.float32, got torch.bfloat16": x | {"k": x["k"].bfloat16()},
        "v must have q's dtype": x | {"v": x["v"].half()},
        "q's head size must be 1 to 256, got 257": x
        | {"q": torch.ones(2, 70, 2, 257), "k": torch.ones(2, 70, 2, 257)},
        "v's head size must be 1 to 256, got 300": x | {"v": torch.ones(2, 70, 2, 300)},
        "beta must be [B, T, H] = [2, 70, 2], got [2, 70]": x | {"beta": x["beta"][..., 0]},
        "beta must have a floating-point dtype": x | {"beta": x["beta"].long()},
        "g must be [B, T, H]": x | {"g": x["g"][:1]},
        "g must be on q's device cpu, got meta": x | {"g": x["g"].to("meta")},
        "initial_state must be [N, H, K, V] = [2, 2, 8, 4], got [1, 2, 8, 4]": x
        | {"initial_state": torch.ones(1, 2, 8, 4)},
        "initial_state must have a floating-point dtype, got torch.int64": x
        | {"initial_state": x["initial_state"].long()},
        "initial_state must be on q's device": x | {"initial_state": x["initial_state"].to("meta")},
        "state_stride must be a positive multiple of 64 or None, got 32": x | {"state_stride": 32},
        "state_stride must be a positive multiple of 64 or None, got 0": x | {"state_stride": 0},
        "backend must be one of": x | {"backend": "cuda"},
        "cu_seqlens packs sequences into one row: q must have B = 1": x | {"cu_seqlens": bounds([0, 70])},
        "cu_seqlens must be [N + 1] of int32 or int64": one | {"cu_seqlens": bounds([0.0, 70.0])},
        "cu_seqlens must start at 0, got 1": one | {"cu_seqlens": bounds([1, 70])},
        "cu_seqlens must end at T = 70, got 69": one | {"cu_seqlens": bounds([0, 69])},
        "cu_seqlens must not decrease, got 40 then 30": x
        | {n: a[:1] for n, a in x.items() if n != "initial_state"}
        | {"initial_state": torch.ones(3, 2, 8, 4), "cu_seqlens": bounds([0, 40, 30, 70])},
    }


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("message", bad_calls())
def test_bad_arguments_are_named(message, backend):
    arguments = {"backend": backend} | bad_calls()[message]
    with pytest.raises(ValueError) as error:
        chunk_delta_rule(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("state_indices must be in [0, 2), got values from 0 to 2", {"state_indices": torch.tensor([0, 2])}),
        (
            "state_indices must be in [0, 2), got values from -1 to 0",
            {"state_indices": torch.tensor([0, -1])},
        ),
        ("state_indices must be [B] = [2]", {"state_indices": torch.tensor([0])}),
        ("state_indices must be [B] = [2] of int32 or int64", {"state_indices": torch.tensor([0.0, 1.0])}),
        ("state_indices needs initial_state", {"state_indices": torch.tensor([0, 1]), "initial_state": None}),
        ("initial_state must be [N, H, K, V] = [2, 2, 8, 4]", {"initial_state": torch.ones(2, 2, 8, 5)}),
    ],
)
def test_bad_arguments_of_decoding_are_named(message, changed):
    with pytest.raises(ValueError) as error:
        recurrent_delta_rule(**(make_inputs(2, 1, 2, 8, 4) | changed))
    assert message in str(error.value)


def test_gradcheck():
    """The written-out backward against finite differences, apart from the reference."""
    inputs = make_inputs(1, 35, 1, 3, 2, dtype=torch.float64)

    def op(q, k, v, beta, g, initial_state):
        return chunk_delta_rule(
            q, k, v, beta, g=g, initial_state=initial_state, output_final_state=True, state_stride=64,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs.values()], fast_mode=True)
