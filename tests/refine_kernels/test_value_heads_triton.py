"""Value heads that share key heads: every delta-rule kernel against the rule with q and k repeated, in float64.

The launchers are called directly: no copy of q or k is theirs to make.
"""

from __future__ import annotations

import pytest
import torch

from refine_kernels.delta_rule import reference, triton_chunk, triton_recurrent
from tests.numerics import assert_close
from tests.refine_kernels import test_delta_rule as shared
from tests.refine_kernels.test_delta_rule_recurrent_triton import DEVICE, layer_expected, make_layer

pytestmark = pytest.mark.usefixtures("interpreter", "_one_thread")
_one_thread = shared._one_thread
NAMES = ("q", "k", "v", "beta", "g", "initial_state")


def make_inputs(rows, tokens, heads, repeat, kd, vd, *, gated, states=None, growing=False):
    """q and k of ``heads``, all else of ``heads * repeat``; with ``growing`` some decays are above 0."""
    inputs = shared.make_inputs(rows, tokens, heads * repeat, kd, vd, gated=gated, states=states)
    inputs |= {name: inputs[name][:, :, :heads].contiguous() for name in ("q", "k")}
    if growing:
        inputs["g"] = -inputs["g"] * torch.where(torch.arange(tokens) % 3 == 0, 1.0, -1.0)[:, None]
    return {name: None if x is None else x.to(DEVICE) for name, x in inputs.items()}


def run_reference(inputs, repeat, upstream=None, **options):
    """Outputs, and with ``upstream`` the gradients of all inputs, of the definition in float64."""
    leaves = {n: x.double().requires_grad_(upstream is not None) for n, x in inputs.items() if x is not None}
    q, k = (leaves[n].repeat_interleave(repeat, 2) for n in ("q", "k"))
    outputs = reference.chunk_delta_rule(
        q, k, leaves["v"], leaves["beta"], g=leaves.get("g"), initial_state=leaves.get("initial_state"),
        output_final_state=True, use_qk_l2norm_in_kernel=True, **options,
    )  # fmt: skip
    if upstream is None:
        return outputs, {}
    found = torch.autograd.grad(outputs, list(leaves.values()), [x.double() for x in upstream])
    return outputs, dict(zip(leaves, found))


def check_chunks(inputs, repeat, *, state_stride=64, cu_seqlens=None, nothing_forgotten=False):
    """``nothing_forgotten``: a gate's gradient ``<S, dS>`` is nearly the same sum over the state at every token. It
    may cancel and is measured against its terms, known at the first token."""
    given = [inputs[name] for name in NAMES]
    scale = inputs["q"].shape[-1] ** -0.5
    o, final, states, checkpoints, kept = triton_chunk.forward(
        *given, cu_seqlens, scale, True, True, state_stride, True
    )
    random = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=random).to(x) for x in (o, final, states)]
    found = triton_chunk.backward(*given, cu_seqlens, checkpoints, kept, *upstream, scale, True, state_stride)
    options = {"state_stride": state_stride, "cu_seqlens": cu_seqlens, "scale": scale}
    expected, gradients = run_reference(inputs, repeat, upstream, **options)
    for name, x, e in zip(("o", "final state", "states"), (o, final, states), expected):
        assert_close(x, e, 1e-5, name)
    for name, x in zip(NAMES, found):
        if inputs[name] is not None:
            assert x.dtype == inputs[name].dtype
            tolerance = 1e-5
            if name == "g" and nothing_forgotten:
                terms = gradients["initial_state"] * inputs["initial_state"].double()
                size = terms.norm() * x.shape[1] ** 0.5
                tolerance *= max(1.0, (size / gradients["g"].norm()).item())
            assert_close(x, gradients[name], tolerance, f"d{name}")
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_chunks(repeat, gated, monkeypatch):
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 128)
    check_chunks(make_inputs(2, 150, 2 if repeat == 2 else 1, repeat, 20, 24, gated=gated), repeat)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("repeat", [2, 3])
def test_chunks_whose_states_are_read(repeat, gated):
    """Head sizes too large to be carried: float32 at K = 100 goes by 32 tokens."""
    check_chunks(make_inputs(1, 70, 1, repeat, 100, 36, gated=gated), repeat)


@pytest.mark.parametrize("repeat", [2])
def test_packed_and_split(repeat, monkeypatch):
    monkeypatch.setattr(triton_chunk, "GROUP_TOKENS", 128)
    monkeypatch.setattr(triton_chunk, "span_tokens", lambda *_: 256)
    lengths = (300, 0, 1, 515)
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    inputs = make_inputs(1, sum(lengths), 1, repeat, 16, 8, gated=True, states=len(lengths))
    check_chunks(inputs, repeat, cu_seqlens=cu_seqlens)


def test_gradients_are_summed_in_one_order():
    inputs = make_inputs(1, 70, 1, 4, 16, 16, gated=False)
    first, second = check_chunks(inputs, 4), check_chunks(inputs, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_decays_above_zero():
    """A gate that grows: nothing is cut off."""
    check_chunks(make_inputs(2, 100, 1, 1, 16, 24, gated=True, growing=True), 1)
    strong = make_inputs(1, 64, 1, 1, 16, 8, gated=True)
    strong["g"] = torch.full_like(strong["g"], 0.5)
    check_chunks(strong, 1, nothing_forgotten=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(("heads", "repeat"), [(3, 1), (2, 2), (1, 4)])
def test_recurrent(heads, repeat, gated):
    inputs = make_inputs(3, 5, heads, repeat, 20, 24, gated=gated, states=2)
    indices = torch.tensor([1, 0, 1], device=DEVICE)
    given = [inputs[name] for name in NAMES]
    o, final = triton_recurrent.forward(*given, indices, 0.3, True, True)
    rows = inputs | {"initial_state": inputs["initial_state"][indices]}
    expected, _ = run_reference(rows, repeat, scale=0.3)
    assert_close(o, expected[0], 1e-5)
    assert_close(final, expected[1], 1e-5)


@pytest.mark.parametrize("repeat", [2, 4])
def test_layer(repeat):
    """Convolutions and tails of q and k are those of key heads."""
    inputs = make_layer(2, 3, 4, 20, 24, 4, parents=3, gated=True)
    kd, heads = 20, 4 // repeat
    narrow = dict(inputs)
    narrow |= {n: inputs[n][..., : heads * kd].contiguous() for n in "qk"}
    narrow["weights"] = (*(x[: heads * kd] for x in inputs["weights"][:2]), inputs["weights"][2])
    narrow["tails"] = (*(x[..., : heads * kd].contiguous() for x in inputs["tails"][:2]), inputs["tails"][2])
    wide = dict(inputs)
    spread = lambda x, d: x.unflatten(d, (heads, kd)).repeat_interleave(repeat, d).flatten(d, d + 1)  # noqa: E731
    wide |= {n: spread(narrow[n], 2) for n in "qk"}
    wide["weights"] = (*(spread(x, 0) for x in narrow["weights"][:2]), inputs["weights"][2])
    wide["tails"] = (*(spread(x, 2) for x in narrow["tails"][:2]), inputs["tails"][2])
    arguments = [narrow[n] for n in ("q", "k", "v", "beta", "g")]
    o, state, tails = triton_recurrent.decode_forward(
        *arguments, narrow["weights"], narrow["tails"], narrow["state"], narrow["rows"], kd**-0.5, 1.0, True
    )
    expected = layer_expected(**wide)
    assert_close(o, expected[0], 1e-5)
    assert_close(state, expected[1], 1e-5)
    for x, e in zip((*(spread(x, 2) for x in tails[:2]), tails[2]), expected[2]):
        assert torch.equal(x.double(), e)
