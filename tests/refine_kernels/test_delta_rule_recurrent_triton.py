"""The decode kernel against the definition, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from refine_kernels.delta_rule import reference, triton_recurrent
from refine_kernels.delta_rule.decode import _decode_op, delta_net_decode
from tests.numerics import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("interpreter")


def make_inputs(rows, tokens, heads, kd, vd, *, gated=True, states=None, dtype=torch.float32, seed=0):
    """q, k, v, beta, g and the states of ``states`` parents, as a model makes them."""
    random = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)  # noqa: E731
    inputs = [new(rows, tokens, heads, kd), new(rows, tokens, heads, kd), new(rows, tokens, heads, vd)]
    inputs.append(new(rows, tokens, heads).sigmoid())
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    g = F.logsigmoid(new(rows, tokens, heads) + 2).to(DEVICE, torch.float32) if gated else None
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = new(rows if states is None else states, heads, kd, vd).to(DEVICE, state_dtype)
    return [*inputs, g], state


def expected(inputs, state, indices, *, l2norm=True, scale=None):
    q, k, v, beta, g = (None if x is None else x.double() for x in inputs)
    return reference.recurrent_delta_rule(
        q, k, v, beta, g=g, scale=scale, initial_state=None if state is None else state.double(),
        state_indices=indices, output_final_state=True, use_qk_l2norm_in_kernel=l2norm,
    )  # fmt: skip


def check(inputs, state, indices=None, *, tolerance=1e-5, l2norm=True, scale=None):
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    o, final = triton_recurrent.forward(*inputs, state, indices, scale, l2norm, True)
    o_expected, final_expected = expected(inputs, state, indices, l2norm=l2norm, scale=scale)
    assert o.dtype == inputs[0].dtype
    assert final.dtype == (torch.float64 if o.dtype == torch.float64 else torch.float32)
    assert_close(o, o_expected, tolerance, "o")
    assert_close(final, final_expected, max(tolerance, 1e-5) if o.dtype != torch.float64 else tolerance, "S")


@pytest.mark.parametrize("kd, vd", [(1, 1), (60, 100), (64, 64), (96, 33), (128, 128), (256, 256)])
@pytest.mark.parametrize("gated", [False, True])
def test_parity_over_head_sizes(kd, vd, gated):
    inputs, state = make_inputs(2, 3, 1, kd, vd, gated=gated)
    check(inputs, state)


@pytest.mark.parametrize(
    "tokens, dtype",
    [(1, torch.int32), (2, torch.int64), (5, torch.int32), (8, torch.int64), (19, torch.int64)],
)
def test_parity_over_lengths_and_branches(tokens, dtype):
    inputs, state = make_inputs(4, tokens, 2, 20, 24, states=3)
    check(inputs, state, torch.tensor([2, 0, 2, 1], dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.float64, 1e-12)])
def test_parity_over_dtypes(dtype, tolerance):
    for gated in (False, True):
        inputs, state = make_inputs(2, 4, 2, 36, 48, gated=gated, dtype=dtype)
        check(inputs, state, torch.tensor([1, 0], device=DEVICE), tolerance=tolerance)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no bfloat16 arithmetic")
def test_parity_in_bfloat16():
    inputs, state = make_inputs(8, 5, 4, 128, 128, dtype=torch.bfloat16)
    check(inputs, state, tolerance=4e-3)


def test_without_states_norms_or_the_final_state():
    inputs, _ = make_inputs(2, 4, 2, 16, 24)
    inputs[1] = F.normalize(inputs[1], dim=-1)
    check(inputs, None, l2norm=False, scale=0.3)
    o, final = triton_recurrent.forward(*inputs, None, None, 0.3, False, False)
    assert final is None
    assert_close(o, expected(inputs, None, None, l2norm=False, scale=0.3)[0], 1e-5)


def test_parents_are_read_and_never_written():
    inputs, state = make_inputs(4, 2, 2, 16, 16, states=3)
    state[1] = float("nan")  # the parent of no row
    before = state.clone()
    indices = torch.tensor([2, 0, 0, 2], device=DEVICE)
    o, final = triton_recurrent.forward(*inputs, state, indices, 1.0, True, True)
    assert torch.equal(state.nan_to_num(7.0), before.nan_to_num(7.0))
    o_expected, final_expected = expected(inputs, state, indices, scale=1.0)
    assert_close(o, o_expected, 1e-5)
    assert_close(final, final_expected, 1e-5)


def test_a_branch_of_nan_stays_alone():
    inputs, state = make_inputs(3, 2, 1, 16, 16)
    inputs[2][1] = float("nan")
    o, final = triton_recurrent.forward(*inputs, state, None, 1.0, True, True)
    assert torch.isnan(o[1]).all() and torch.isnan(final[1]).all()
    assert torch.isfinite(o[[0, 2]]).all() and torch.isfinite(final[[0, 2]]).all()


def test_one_token_after_another_is_all_at_once():
    inputs, state = make_inputs(2, 6, 2, 32, 64)
    o, final = triton_recurrent.forward(*inputs, state, None, 1.0, True, True)
    parts = []
    for t in range(6):
        token = [x[:, t : t + 1] for x in inputs]
        part, state = triton_recurrent.forward(*token, state, None, 1.0, True, True)
        parts.append(part)
    assert_close(torch.cat(parts, 1), o, 1e-6)
    assert_close(state, final, 1e-6)


def test_views_of_a_fused_projection():
    """Nothing is assumed of the strides over rows, tokens and heads, nor of the last dimension."""
    inputs, state = make_inputs(3, 4, 2, 24, 24)
    q, k, v, beta, g = inputs
    fused = torch.cat([q, k, v], 2).contiguous()  # [B, T, 3H, D]
    q, k, v = (fused[:, :, 2 * i : 2 * i + 2] for i in range(3))
    beta = beta.transpose(1, 2).contiguous().transpose(1, 2)
    g = torch.stack([g, g], -1)[..., 0]
    pool = torch.stack([torch.zeros_like(state), state], 1)  # [N, 2, H, K, V]
    check([q, k, v, beta, g], pool[:, 1])
    v = v.transpose(-1, -2).contiguous().transpose(-1, -2)
    check([q, k, v, beta, g], pool[:, 1].transpose(-1, -2).contiguous().transpose(-1, -2))
    one = q[:1, :1].expand(3, 4, 2, 24)
    check([one, one, v, beta, g], pool[:, 1])


@pytest.mark.parametrize(
    "beta, decay", [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (0.5, -50.0), (1.0, float("-inf"))]
)
def test_edges_of_stability(beta, decay):
    inputs, state = make_inputs(2, 8, 1, 16, 16)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1]) + 1e-3 * inputs[1]  # nearly parallel keys
    inputs[3] = torch.full_like(inputs[3], beta)
    inputs[4] = torch.full_like(inputs[4], decay)
    check(inputs, state)


def test_a_head_of_zeros_has_no_direction_and_no_nan():
    inputs, state = make_inputs(1, 2, 1, 16, 16)
    inputs[0], inputs[1] = torch.zeros_like(inputs[0]), torch.zeros_like(inputs[1])
    check([*inputs[:4], None], state)


@pytest.mark.parametrize(
    "kd, vd, double", [(1, 1, False), (60, 60, False), (128, 128, False), (256, 256, True)]
)
def test_tiles_cover_the_state_within_the_registers(kd, vd, double):
    for kernel in ("recurrent", "decode"):
        bk, bv, num_warps = triton_recurrent.choose_tile(kernel, kd, vd, double)
        assert bk >= kd and 8 <= bv <= 32
        words = bk * bv * (2 if double else 1)
        assert words / (32 * num_warps) <= 128 and num_warps in (1, 2, 4, 8)


# --- a layer's whole decode step --------------------------------------------------------------------------


def make_layer(b, tokens, heads, kd, vd, width, *, parents, gated=False, dtype=torch.float32, seed=0):
    """What lies between a layer's projections and its output norm, by the arguments' names."""
    random = torch.Generator().manual_seed(seed)
    sizes = (heads * kd, heads * kd, heads * vd)
    new = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(DEVICE, dtype)  # noqa: E731
    state = torch.randn(parents, heads, kd, vd, generator=random, dtype=torch.float64)
    inputs = dict(zip("qkv", (new(b, tokens, size) for size in sizes)))
    inputs |= {"beta": new(b, tokens, heads), "weights": tuple(new(size, width) for size in sizes)}
    inputs |= {"tails": tuple(new(parents, width - 1, size) for size in sizes)}
    inputs["state"] = state.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    inputs["g"] = F.logsigmoid(new(b, tokens, heads).float() + 2) if gated else None
    inputs["rows"] = torch.randint(parents, (b,), generator=random).to(DEVICE)
    return inputs


def layer_expected(*, q, k, v, beta, weights, tails, state, g, rows, scale=None, beta_scale=1.0):
    """In float64, with PyTorch's own convolution."""
    read, new_tails = [], []
    for x, weight, tail in zip((q, k, v), weights, tails):
        inputs = torch.cat([tail[rows].double(), x.double()], 1).transpose(1, 2)  # [B, D, W - 1 + T]
        y = F.conv1d(inputs, weight.double()[:, None], groups=weight.shape[0]).transpose(1, 2)
        read.append(F.silu(y).unflatten(-1, (state.shape[1], -1)))
        new_tails.append(inputs[..., x.shape[1] :].transpose(1, 2))
    o, new_state = reference.recurrent_delta_rule(
        *read, beta.double().sigmoid() * beta_scale, g=None if g is None else g.double(), scale=scale,
        initial_state=state.double(), state_indices=rows, output_final_state=True, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    return o, new_state, new_tails


def check_layer(inputs, tolerance=1e-5, **options):
    expected = layer_expected(**inputs, **{x: options[x] for x in options if x != "backend"})
    o, state, tails = delta_net_decode(**inputs, **options)
    assert o.dtype == inputs["q"].dtype and state.dtype == inputs["state"].dtype
    assert_close(o, expected[0], tolerance, "o")
    assert_close(state, expected[1], tolerance, "state")
    for actual, tail in zip(tails, expected[2]):
        assert actual.dtype == o.dtype and torch.equal(actual.double(), tail)


BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch", "reference"])


@BACKENDS
@pytest.mark.parametrize("width", [1, 2, 4])
def test_layer_parity_over_lengths_and_widths(width, backend):
    for tokens in (1, 2, 5):
        inputs = make_layer(2, tokens, 2, 20, 24, width, parents=3, gated=tokens == 2)
        check_layer(inputs, backend=backend)


@BACKENDS
def test_layer_parity_over_dtypes_and_head_sizes(backend):
    check_layer(make_layer(2, 1, 1, 128, 128, 4, parents=3, gated=True), backend=backend)
    check_layer(make_layer(2, 2, 1, 60, 100, 4, parents=3, dtype=torch.float64), 1e-12, backend=backend)
    check_layer(make_layer(2, 2, 2, 36, 40, 4, parents=3, dtype=torch.float16), 4e-3, backend=backend)


@BACKENDS
def test_layer_options_and_fused_projections(backend):
    inputs = make_layer(3, 2, 2, 16, 16, 4, parents=3)
    options = {"scale": 0.7, "beta_scale": 2.0, "backend": backend}
    check_layer(inputs, **options)
    with_rows = delta_net_decode(**inputs, **options)
    fused = torch.cat([inputs[x] for x in "qkv"], -1)
    inputs |= dict(zip("qkv", fused.chunk(3, -1)))
    inputs["tails"] = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs["tails"])
    for a, b in zip(with_rows[:2], delta_net_decode(**inputs, **options)[:2]):
        assert_close(a, b, 1e-6)
    rows = inputs.pop("rows")
    inputs["tails"] = tuple(x[rows] for x in inputs["tails"])
    inputs["state"] = inputs["state"][rows]
    assert_close(delta_net_decode(**inputs, **options)[0], with_rows[0], 1e-6)


@BACKENDS
def test_layer_continues_from_what_it_returned(backend):
    inputs = make_layer(2, 6, 1, 16, 24, 4, parents=2)
    whole = delta_net_decode(**inputs, backend=backend)
    before = {x: inputs[x].clone() for x in ("state", "rows")}
    parts, at = [], {**inputs}
    for t in range(6):
        at |= {x: inputs[x][:, t : t + 1] for x in ("q", "k", "v", "beta")}
        o, at["state"], at["tails"] = delta_net_decode(**at, backend=backend)
        at["rows"] = None
        parts.append(o)
    assert_close(torch.cat(parts, 1), whole[0], 1e-6)
    assert_close(at["state"], whole[1], 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(at["tails"], whole[2]))
    assert all(torch.equal(inputs[x], before[x]) for x in before)


def test_layer_custom_op():
    inputs = make_layer(2, 1, 1, 8, 8, 4, parents=3)
    arguments = [inputs[x] for x in ("q", "k", "v", "beta", "g")]
    arguments += [list(inputs["weights"]), list(inputs["tails"]), inputs["state"], inputs["rows"]]
    torch.library.opcheck(_decode_op, (*arguments, 0.5, 1.0, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": lambda x: x[0]}, r"q must be \[B, T, H K\] with T >= 1, got \[1, 16\]"),
        ({"q": lambda x: x.long()}, "q must be float32, bfloat16, float16 or float64, got torch.int64"),
        ({"k": lambda x: x[..., :-1]}, r"k must be \[2, 1, 16\], got \[2, 1, 15\]"),
        ({"v": lambda x: x.half()}, "v must have q's dtype torch.float32, got torch.float16"),
        ({"beta": lambda x: x[..., :1]}, r"beta must be \[2, 1, 2\], got \[2, 1, 1\]"),
        ({"g": lambda x: torch.zeros(2, 1)}, r"g must be \[2, 1, 2\], got \[2, 1\]"),
        ({"state": lambda x: x.long()}, "state must have a floating-point dtype, got torch.int64"),
        ({"state": lambda x: x.new_zeros(3, 2, 8, 257)}, r"K, V in \[1, 256\]"),
        ({"rows": lambda x: x.float()}, "rows must be int32 or int64, got torch.float32"),
        ({"rows": lambda x: None}, "state must have q's B = 2 rows without rows, got 3"),
        (
            {"tails": lambda x: (x[0], x[1][:, 1:], x[2])},
            r"tails of k must be \[3, 3, 16\], got \[3, 2, 16\]",
        ),
        ({"weights": lambda x: (*x[:2], x[2][:, 1:])}, r"weights of v must be \[16, 4\], got \[16, 3\]"),
        ({"beta": lambda x: x.long()}, "beta must have a floating-point dtype, got torch.int64"),
    ],
)
def test_layer_refuses_what_does_not_fit(change, message):
    inputs = make_layer(2, 1, 2, 8, 8, 4, parents=3)
    for name, function in change.items():
        inputs[name] = function(inputs[name])
    with pytest.raises(ValueError, match=message):
        delta_net_decode(**inputs)
