"""What holds for every op alike: dtypes, autocast, float64, meta tensors, forward-mode AD, backends."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from refine_kernels import (
    chunk_delta_rule,
    chunk_lact,
    delta_net_decode,
    dispatch,
    linear_cross_entropy,
    linear_logprob,
    recurrent_delta_rule,
)
from refine_kernels.lact import lact_finish, lact_prepare


def delta(tokens):
    return [torch.randn(2, tokens, 2, 8) for _ in range(3)] + [torch.rand(2, tokens, 2)]


def head():
    return [torch.randn(6, 8), torch.randn(11, 8), torch.randint(11, (6,))]


def lact():
    weights = [torch.randn(2, 6, 4), torch.randn(2, 5, 6), torch.randn(2, 6, 4)]
    return (
        weights
        + [torch.randn(2, 9, 4), torch.randn(2, 9, 4), torch.randn(2, 9, 5)]
        + [torch.rand(2, 9, 1)] * 3
    )


def layer():
    tensors = [torch.randn(2, 1, 16) for _ in range(3)] + [torch.randn(2, 1, 2)]
    return [*tensors, [torch.randn(16, 4)] * 3, [torch.randn(2, 3, 16)] * 3, torch.randn(2, 2, 8, 8)]


def ends(op):
    if op is lact_prepare:
        return [*(torch.randn(2, 3, 8) for _ in range(3)), torch.randn(8, 2), torch.randn(8, 2), None]
    return [torch.randn(2, 2, 3, 4), torch.randn(2, 3, 8), torch.randn(4), None]


# name -> (op of its tensors and keywords, its tensors, the place of its main input)
OPS = {
    "chunk_delta_rule": (lambda *x, **o: chunk_delta_rule(*x, **o)[0], lambda: delta(5), 0),
    "recurrent_delta_rule": (lambda *x, **o: recurrent_delta_rule(*x, **o)[0], lambda: delta(1), 2),
    "delta_net_decode": (lambda *x, **o: delta_net_decode(*x, **o)[0], layer, 0),
    "chunk_lact": (lambda *x, **o: chunk_lact(*x, chunk_size=4, **o), lact, 3),
    "chunk_lact's weights": (lambda *x, **o: chunk_lact(*x, chunk_size=4, **o), lact, 0),
    "lact_prepare": (lambda *x, **o: lact_prepare(*x, num_heads=2, **o)[0], lambda: ends(lact_prepare), 0),
    "lact_finish": (lact_finish, lambda: ends(lact_finish), 0),
    "linear_logprob": (lambda *x, **o: linear_logprob(*x, **o).logprob, head, 0),
    "linear_cross_entropy": (linear_cross_entropy, head, 1),
}
ALL = pytest.mark.parametrize("name", OPS)


def mapped(function, tensors):
    """``function`` of every floating-point tensor."""
    if isinstance(tensors, list):
        return [mapped(function, x) for x in tensors]
    return function(tensors) if tensors is not None and tensors.is_floating_point() else tensors


@ALL
def test_float64_is_computed_in_pytorch_whatever_is_asked_for(name, interpreter, monkeypatch):
    op, make, _ = OPS[name]
    tensors = mapped(torch.Tensor.double, make())
    expected = op(*tensors, backend="torch")
    assert expected.dtype == torch.float64
    for asked in ("triton", None):
        assert torch.equal(op(*tensors, backend=asked), expected)
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert torch.equal(op(*tensors), expected)


@ALL
def test_bfloat16_is_refused_in_tritons_interpreter(name, interpreter):
    op, make, _ = OPS[name]
    tensors = make()
    with pytest.raises(ValueError, match="bfloat16 cannot run under TRITON_INTERPRET=1"):
        op(*mapped(torch.Tensor.bfloat16, tensors), backend="triton")
    if name != "delta_net_decode":
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match="bfloat16 cannot run"),
        ):
            op(*tensors)
    half = mapped(torch.Tensor.bfloat16, tensors)
    assert op(*half, backend="torch").isfinite().all()


def test_an_interpreter_that_computes_bfloat16_may_say_so(interpreter, monkeypatch):
    q = torch.ones(1, dtype=torch.bfloat16)
    monkeypatch.setattr(dispatch, "_interpreter_computes_bfloat16", False)
    dispatch.interpreter_computes_bfloat16(True)
    assert dispatch.choose_backend("triton", torch.float32, q) == "triton"
    dispatch.interpreter_computes_bfloat16(False)
    with pytest.raises(ValueError, match="bfloat16"):
        dispatch.choose_backend("triton", torch.float32, q)


@ALL
@pytest.mark.parametrize("way", ["torch.func.jvp", "dual tensors"])
def test_forward_mode_raises(name, way):
    op, make, place = OPS[name]
    tensors = make()

    def of_one(x):
        return op(*tensors[:place], x, *tensors[place + 1 :])

    x, tangent = tensors[place], torch.ones_like(tensors[place])
    with pytest.raises(NotImplementedError, match="forward-mode AD"):
        if way == "torch.func.jvp":
            torch.func.jvp(of_one, (x,), (tangent,))
        else:
            with forward_ad.dual_level():
                of_one(forward_ad.make_dual(x, tangent))


def test_forward_mode_of_the_definition():
    """The reference is plain PyTorch: there it works."""
    q, k, v, beta = delta(5)
    tangent = torch.randn_like(q)
    found = torch.func.jvp(
        lambda q: chunk_delta_rule(q, k, v, beta, backend="reference")[0], (q,), (tangent,)
    )[1]
    torch.testing.assert_close(found, chunk_delta_rule(tangent, k, v, beta)[0])  # the rule is linear in q


@ALL
@pytest.mark.parametrize("amp", [False, True], ids=["plain", "autocast"])
def test_meta_tensors_give_shapes(name, amp):
    op, make, _ = OPS[name]
    tensors = make()
    expected = op(*tensors)
    to_meta = lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x  # noqa: E731
    meta = [[to_meta(y) for y in x] if isinstance(x, list) else to_meta(x) for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        found = op(*meta)
    assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype


def test_meta_tensors_where_values_are_needed():
    q, k, v, beta = (x[:1].to("meta") for x in delta(5))
    assert chunk_delta_rule(q, k, v, beta, cu_seqlens=[0, 2, 5], output_final_state=True)[1].shape[0] == 2
    assert linear_logprob(*(x.to("meta") for x in head()), sample=True).token.shape == (6,)
    with pytest.raises(ValueError, match="state_stride must be None with cu_seqlens on the meta device"):
        chunk_delta_rule(q, k, v, beta, cu_seqlens=[0, 2, 5], state_stride=64)
    with pytest.raises(
        ValueError, match="cu_seqlens must not be on the meta device with backend='reference'"
    ):
        chunk_delta_rule(q, k, v, beta, cu_seqlens=[0, 2, 5], backend="reference")


def test_decays_above_zero():
    """A state that grows: values and gradients in float64 against the definition."""
    q, k, v, beta = (x.double() for x in delta(40))
    leaves = [x.requires_grad_() for x in (q, k, v, beta, torch.rand(2, 40, 2).double() * 0.3)]

    def gradients(backend):
        o, state = chunk_delta_rule(*leaves[:4], g=leaves[4], output_final_state=True, backend=backend,
                                    use_qk_l2norm_in_kernel=True)  # fmt: skip
        return [o, state, *torch.autograd.grad(o.sum() + state.square().sum(), leaves)]

    for found, expected in zip(gradients("torch"), gradients("reference")):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_no_rows_of_lact():
    tensors = [x[:0].requires_grad_() for x in lact()]
    o, state = chunk_lact(*tensors, chunk_size=4, use_muon=True, momentum=tensors[6], output_final_state=True)
    gradients = torch.autograd.grad(o.sum() + state.weights.applied.sum(), tensors, allow_unused=True)
    assert o.shape == (0, 9, 5) and gradients[0].shape == (0, 6, 4)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("state_stride must be a positive multiple of 64 or None, got 64.0", {"state_stride": 64.0}),
        ("cu_seqlens must be integers", {"cu_seqlens": [0, 2.5, 5]}),
        ("cu_seqlens must start at 0", {"cu_seqlens": []}),
        ("cu_seqlens must end at T = 5, got 4", {"cu_seqlens": [0, 4]}),
        ("scale must be a number or None, got '1'", {"scale": "1"}),
    ],
)
def test_odd_arguments_are_named(message, changed):
    with pytest.raises(ValueError) as error:
        chunk_delta_rule(*(x[:1] for x in delta(5)), **changed)
    assert message in str(error.value)


def test_an_effective_weight_of_any_kind():
    """The head takes what a module computes: not a leaf, transposed, without a gradient, of another dtype."""
    x, weight, target = head()
    x.requires_grad_()
    a, b = torch.randn(11, 2, requires_grad=True), torch.randn(2, 8, requires_grad=True)  # an adapter

    def gradients(loss):
        return torch.autograd.grad(loss, (x, a, b), retain_graph=True)

    for base in (weight, weight.t().contiguous().t(), torch.stack([weight, weight], -1)[..., 0]):
        effective = base + a @ b
        effective = effective if base.is_contiguous() else effective.t().contiguous().t()
        plain = torch.nn.functional.cross_entropy(x @ effective.t(), target)
        for found in (
            linear_cross_entropy(x, effective, target),
            -linear_logprob(x, effective, target).logprob.mean(),
        ):
            torch.testing.assert_close(found, plain)
            for g, e in zip(gradients(found), gradients(plain)):
                assert (g - e).norm() <= 1e-5 * e.norm()
    frozen = linear_cross_entropy(x, weight.detach(), target)
    assert torch.autograd.grad(frozen, x)[0].shape == x.shape
