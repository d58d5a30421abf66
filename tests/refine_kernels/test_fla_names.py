"""fla's callers, served without an adapter: its names, its calls, and the shapes and settings of its own tests.

The truth is the rule in float64: token by token for short sequences, by chunks (equal to it to 1e-10, see
``test_delta_rule.py``) for long ones. Bounds are those that fla allows itself; batches are
smaller than there.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from refine_kernels import (
    chunk_delta_rule,
    chunk_gated_delta_rule,
    delta_net_decode,
    fused_recurrent_delta_rule,
    fused_recurrent_gated_delta_rule,
    recurrent_delta_rule,
    reference,
)
from tests.numerics import assert_close
from tests.refine_kernels.test_delta_rule import _one_thread  # noqa: F401

BOUNDS = {"o": 0.005, "final_state": 0.005, "dq": 0.008, "dk": 0.008, "dv": 0.008, "dbeta": 0.02, "dg": 0.02}
BOUNDS["dinitial_state"] = 0.008


def make_inputs(B, T, H, HV, D, dtype, *, normalizer=1.0, mask=0.0, states=None, gated=True):
    """q, k, v, beta, g and the initial state, as fla's tests draw them."""
    inputs = {
        "q": torch.rand(B, T, H, D),
        "k": torch.rand(B, T, H, D),
        "v": torch.rand(B, T, HV, D),
        "beta": torch.rand(B, T, HV).sigmoid(),
        "g": F.logsigmoid(torch.rand(B, T, HV)) / normalizer * (torch.rand(B, T, HV) > mask),
        "initial_state": torch.randn(B if states is None else states, HV, D, D),
    }
    halves = ("q", "k", "v")
    inputs = {name: x.to(dtype) if name in halves else x for name, x in inputs.items()}
    return inputs if gated else {name: x for name, x in inputs.items() if name != "g"}


def with_gradients(op, inputs, **options):
    """o, final state and the gradients of both together, by name."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    o, final_state = op(**leaves, output_final_state=True, **options)
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=random).to(x) for x in (o, final_state)]
    gradients = torch.autograd.grad((o, final_state), list(leaves.values()), upstream)
    return {"o": o, "final_state": final_state} | {f"d{n}": d for n, d in zip(leaves, gradients)}


def truth(inputs, T, **options):
    inputs = {name: x.double() for name, x in inputs.items()}
    return with_gradients(chunk_delta_rule, inputs, backend="reference" if T <= 128 else "torch", **options)


def assert_within_bounds(actual, expected):
    for name, x in expected.items():
        assert_close(actual[name], x, BOUNDS[name], name)


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "D", "scale", "normalizer", "mask", "l2norm", "dtype"),
    [
        (1, 63, 1, 1, 64, 1, 1, 0, False, torch.float16),
        (2, 500, 3, 3, 60, 1, 1, 0, False, torch.float16),
        (2, 1000, 3, 3, 64, 0.1, 1, 0.5, False, torch.float16),
        (1, 1024, 4, 4, 100, 1, 0.1, 0, False, torch.float16),
        (1, 1024, 4, 4, 128, 0.1, 1, 0, True, torch.bfloat16),
        (1, 1024, 2, 8, 128, 0.1, 1, 0, False, torch.float16),
        (1, 1500, 4, 8, 128, 0.1, 10, 0, True, torch.float16),
        (1, 2048, 8, 8, 64, 0.1, 1, 0, True, torch.float16),
    ],
)
def test_chunk_gated(B, T, H, HV, D, scale, normalizer, mask, l2norm, dtype):
    inputs = make_inputs(B, T, H, HV, D, dtype, normalizer=normalizer, mask=mask)
    if not l2norm:
        inputs |= {name: F.normalize(inputs[name], dim=-1) for name in ("q", "k")}
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    actual = with_gradients(chunk_gated_delta_rule, inputs, **options)
    assert_within_bounds(actual, truth(inputs, T, **options))


@pytest.mark.parametrize(
    ("H", "HV", "D", "mask", "bounds"),
    [
        (4, 4, 60, 0.1, [0, 15]),
        (4, 4, 64, 0.9, [0, 256, 500, 1000]),
        (2, 4, 64, 0.5, [0, 256, 500, 1000]),
        (4, 4, 100, 0.0, [0, 15, 100, 300, 1200, 2000]),
    ],
)
@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
def test_chunk_gated_packed(H, HV, D, mask, bounds, as_list):
    inputs = make_inputs(1, bounds[-1], H, HV, D, torch.float16, mask=mask, states=len(bounds) - 1)
    cu_seqlens = bounds if as_list else torch.tensor(bounds)
    options = {"cu_seqlens": cu_seqlens, "use_qk_l2norm_in_kernel": True}
    actual = with_gradients(chunk_gated_delta_rule, inputs, **options)
    assert_within_bounds(actual, truth(inputs, bounds[-1], **options))


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "D", "scale", "normalizer", "l2norm", "dtype"),
    [
        (1, 63, 1, 1, 64, 1, 1, False, torch.float32),
        (2, 500, 4, 4, 60, 1, 1, True, torch.float32),
        (2, 1000, 2, 8, 128, 1, 0.1, True, torch.float32),
        (1, 1024, 2, 2, 128, 0.1, 1, True, torch.float32),
        (1, 1024, 4, 8, 128, 1, 10, True, torch.float16),
    ],
)
def test_fused_recurrent_gated(B, T, H, HV, D, scale, normalizer, l2norm, dtype):
    inputs = make_inputs(B, T, H, HV, D, dtype, normalizer=normalizer)
    if not l2norm:
        inputs |= {name: F.normalize(inputs[name], dim=-1) for name in ("q", "k")}
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    expected = truth(inputs, T, **options)
    assert_within_bounds(with_gradients(fused_recurrent_gated_delta_rule, inputs, **options), expected)


@pytest.mark.parametrize(
    ("B", "T", "H", "D", "scale", "l2norm", "dtype"),
    [
        (1, 63, 1, 64, 1, False, torch.float16),
        (2, 100, 4, 60, 0.1, False, torch.float16),
        (1, 1024, 3, 128, 0.1, False, torch.float16),
        (1, 1024, 4, 128, 1, True, torch.float16),
        (1, 2000, 4, 128, 0.1, False, torch.bfloat16),
        (1, 2048, 8, 64, 0.1, False, torch.float16),
    ],
)
@pytest.mark.parametrize("op", [chunk_delta_rule, fused_recurrent_delta_rule], ids=["chunk", "recurrent"])
def test_plain(op, B, T, H, D, scale, l2norm, dtype):
    inputs = make_inputs(B, T, H, H, D, dtype, gated=False)
    inputs |= {name: F.normalize(inputs[name], dim=-1) for name in ("q", "k") if not l2norm}
    inputs["initial_state"] = inputs["initial_state"].to(dtype)  # fla's tests hold it in half precision
    options = {"scale": scale, "use_qk_l2norm_in_kernel": l2norm}
    extra = {"chunk_size": 64} if op is chunk_delta_rule else {}
    actual = with_gradients(op, inputs, **options, **extra)
    assert actual["dinitial_state"].dtype == dtype
    assert_within_bounds(actual, truth(inputs, T, **options))


# --- calls and settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("op", [chunk_delta_rule, recurrent_delta_rule], ids=["chunk", "recurrent"])
def test_an_initial_state_of_any_float_dtype(op, dtype):
    inputs = make_inputs(2, 3, 2, 2, 8, torch.float32)
    inputs["initial_state"] = inputs["initial_state"].to(dtype)
    actual = with_gradients(op, inputs)
    assert actual["final_state"].dtype == torch.float32 and actual["dinitial_state"].dtype == dtype
    expected = truth(inputs, 3)
    for name, x in expected.items():
        assert_close(actual[name], x, 1e-5 if name != "dinitial_state" else 4e-3, name)


def test_positional_order_is_flas():
    q, k, v, beta, g, state = make_inputs(1, 9, 2, 4, 8, torch.float32).values()
    options = {"scale": 0.3, "initial_state": state, "output_final_state": True}
    expected = reference.chunk_delta_rule(q, k, v, beta, g=g, **options)
    for actual in (
        chunk_gated_delta_rule(q, k, v, g, beta, 0.3, state, True),
        fused_recurrent_gated_delta_rule(q, k, v, g, None, None, beta, 0.3, state, True),
    ):
        assert_close(actual[0], expected[0], 1e-5)
        assert_close(actual[1], expected[1], 1e-5)
    plain = reference.chunk_delta_rule(q, k, v, beta, **options)
    for actual, final in (
        fused_recurrent_delta_rule(q, k, v, beta, 0.3, state, True),
        chunk_delta_rule(q, k, v, beta, 0.3, state, True),
    ):
        assert_close(actual, plain[0], 1e-5)
        assert_close(final, plain[1], 1e-5)
    assert chunk_gated_delta_rule(q, k, v, g, beta)[1] is None
    ones = torch.ones_like(beta)
    assert torch.equal(fused_recurrent_delta_rule(q, k, v)[0], fused_recurrent_delta_rule(q, k, v, ones)[0])


@pytest.mark.parametrize("op", ["chunk", "recurrent"])
def test_the_gate_and_the_sigmoid_in_the_kernel(op):
    inputs = {n: x.double() for n, x in make_inputs(2, 40, 2, 4, 8, torch.float32).items()}
    inputs |= {"g": torch.randn(2, 40, 4).double(), "beta": torch.randn(2, 40, 4).double()}
    inputs |= {"A_log": torch.randn(4).double(), "dt_bias": torch.randn(4).double()}
    op = chunk_gated_delta_rule if op == "chunk" else fused_recurrent_gated_delta_rule

    def by_hand(q, k, v, beta, g, initial_state, A_log, dt_bias, **options):
        g = -A_log.exp() * F.softplus(g + dt_bias)
        o, state = reference.chunk_delta_rule(
            q, k, v, 2 * beta.sigmoid(), g=g, initial_state=initial_state.mT, **options
        )
        return o, state.mT

    settings = {"use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    actual = with_gradients(op, inputs, state_v_first=True, **settings)
    for name, x in with_gradients(by_hand, inputs).items():
        assert_close(actual[name], x, 1e-10, name)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        old = with_gradients(op, inputs, transpose_state_layout=True, **settings)
    assert all(torch.equal(old[name], x) for name, x in actual.items())


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("cp_context must be None", {"cp_context": object()}),
        ("A_log must be given with use_gate_in_kernel=True, got None", {"use_gate_in_kernel": True}),
        ("A_log must be [HV] = [4], got [3]", {"use_gate_in_kernel": True, "A_log": torch.zeros(3)}),
        ("allow_neg_eigval needs use_beta_sigmoid_in_kernel=True", {"allow_neg_eigval": True}),
        (
            "state_v_first and transpose_state_layout",
            {"state_v_first": True, "transpose_state_layout": True},
        ),
        ("beta must be [B, T, HV] = [1, 9, 4], got [1, 9, 2]", {"beta": torch.ones(1, 9, 2)}),
        ("v must be [B, T, H, V]", {"v": torch.ones(1, 9, 3, 8)}),
        ("initial_state must be [N, HV, K, V] = [1, 4, 8, 8]", {"initial_state": torch.ones(1, 2, 8, 8)}),
    ],
)
def test_what_changes_a_result_is_refused_by_name(message, changed):
    inputs = make_inputs(1, 9, 2, 4, 8, torch.float32)
    with pytest.raises(ValueError) as error:
        chunk_gated_delta_rule(**(inputs | changed))
    assert message in str(error.value)
    with pytest.raises(ValueError, match="gk must be None"):
        fused_recurrent_gated_delta_rule(*(inputs[n] for n in ("q", "k", "v", "g", "beta")))


def test_the_gated_rules_order_given_to_the_plain_one_is_refused():
    """With one row, one token and one head the numbers would fit."""
    q, k, v, beta, g, _ = make_inputs(1, 1, 1, 1, 8, torch.float32).values()
    for op in (chunk_delta_rule, fused_recurrent_delta_rule):
        with pytest.raises(ValueError, match="scale must be a number or None, got a tensor"):
            op(q, k, v, g, beta)


# --- value heads that are a multiple of key heads -----------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("H", "HV"), [(1, 3), (2, 4), (3, 12)])
@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_value_heads(tokens, H, HV, gated, backend):
    """As with each key head written out once for each of its value heads, whose gradients then add up."""
    inputs = {n: x.double() for n, x in make_inputs(2, tokens, H, HV, 8, torch.float32, gated=gated).items()}
    options = {"use_qk_l2norm_in_kernel": True, "backend": backend}

    def repeated(q, k, **rest):
        return chunk_delta_rule(q.repeat_interleave(HV // H, 2), k.repeat_interleave(HV // H, 2), **rest)

    expected = with_gradients(repeated, inputs, use_qk_l2norm_in_kernel=True, backend="torch")
    for op in (chunk_delta_rule, recurrent_delta_rule):
        for name, x in with_gradients(op, inputs, **options).items():
            assert_close(x, expected[name], 1e-10, name)
        with torch.no_grad():
            o, final_state = op(**inputs, output_final_state=True, **options)
        assert_close(o, expected["o"], 1e-10)
        assert_close(final_state, expected["final_state"], 1e-10)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_value_heads_and_flas_names_in_triton(gated, interpreter):
    inputs = make_inputs(1, 20, 1, 2, 8, torch.float32, gated=gated)
    options = {"use_qk_l2norm_in_kernel": True}
    expected = truth(inputs, 20, **options)
    gated_op, recurrent_op = chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    for op in (chunk_delta_rule, recurrent_delta_rule, gated_op, recurrent_op):
        for name, x in with_gradients(op, inputs, backend="triton", **options).items():
            assert_close(x, expected[name], 1e-5, name)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_value_heads_packed_with_states(backend):
    inputs = {n: x.double() for n, x in make_inputs(1, 200, 2, 6, 8, torch.float32, states=3).items()}
    options = {"cu_seqlens": [0, 70, 70, 200], "state_stride": 64, "output_final_state": True}
    found = chunk_delta_rule(**inputs, **options, backend=backend)
    inputs |= {n: inputs[n].repeat_interleave(3, 2) for n in ("q", "k")}
    for a, b in zip(found, reference.chunk_delta_rule(**inputs, **options)):
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_value_heads_of_a_layers_decode_step(backend):
    H, HV, D, width = 2, 6, 8, 4
    sizes = {"q": H * D, "k": H * D, "v": HV * D}
    projections = {n: torch.randn(3, 2, size) for n, size in sizes.items()}
    weights = [torch.randn(size, width) for size in sizes.values()]
    tails = [torch.randn(3, width - 1, size) for size in sizes.values()]
    rest = {"beta": torch.randn(3, 2, HV), "state": torch.randn(3, HV, D, D), "g": -torch.rand(3, 2, HV)}

    def per_value_head(x):  # [..., H D] -> [..., HV D]
        return x.unflatten(-1, (H, D)).repeat_interleave(HV // H, -2).flatten(-2)

    found = delta_net_decode(**projections, weights=weights, tails=tails, **rest, backend=backend)
    assert found[0].shape == (3, 2, HV, D) and found[2][0].shape == (3, width - 1, H * D)
    wide = {n: x if n == "v" else per_value_head(x) for n, x in projections.items()}
    wide_weights = [per_value_head(w.mT).mT for w in weights[:2]] + weights[2:]
    wide_tails = [per_value_head(t) for t in tails[:2]] + tails[2:]
    expected = delta_net_decode(**wide, weights=wide_weights, tails=wide_tails, **rest, backend=backend)
    assert_close(found[0], expected[0], 1e-6)
    assert_close(found[1], expected[1], 1e-6)


def test_no_repeated_copy_of_queries_and_keys():
    """Peak memory of a call grows by what value heads have, not by another q and k."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    q, k = torch.randn(2, 1, 4096, 2, 64).unbind(0)
    v, beta = torch.randn(1, 4096, 16, 1), torch.rand(1, 4096, 16)
    with Largest() as largest:
        chunk_delta_rule(q, k, v, beta, use_qk_l2norm_in_kernel=True)
    assert largest.numel < 8 * q.numel()


def test_the_recurrent_ops_take_queries_of_another_dtype_than_values():
    """As fla's do: the output has the values' dtype."""
    torch.manual_seed(5)
    q, k = (torch.randn(2, 33, 2, 16) for _ in range(2))
    v, beta = torch.randn(2, 33, 4, 16), torch.rand(2, 33, 4)
    g = -torch.rand(2, 33, 4)
    exact, _ = fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta, use_qk_l2norm_in_kernel=True)
    o, _ = fused_recurrent_gated_delta_rule(q, k, v.half(), g, beta=beta, use_qk_l2norm_in_kernel=True)
    assert o.dtype == torch.float16
    assert_close(o, exact, 2e-3)
    o, _ = fused_recurrent_delta_rule(q, k, v.half(), beta, use_qk_l2norm_in_kernel=True)
    assert o.dtype == torch.float16
