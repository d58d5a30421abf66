"""Ready-made layers: padding, packing, states and gradients are those of sequences alone."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from refine.models import blocks
from refine.models.layers import DeltaNet, GatedDeltaNet, LaCT
from tests.numerics import assert_close

LAYERS = {
    "delta": lambda: DeltaNet(24, num_heads=2),
    "gated": lambda: GatedDeltaNet(24, num_heads=2, head_dim=12, expand_v=1.5),
    "lact": lambda: LaCT(24, num_attn_heads=4, num_lact_heads=2, lact_chunk_size=16, window_size=12),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return LAYERS[request.param]().double()


def test_packed_and_padded_sequences_are_those_alone(layer):
    a, b = torch.randn(1, 41, 24).double(), torch.randn(1, 30, 24).double()
    alone = torch.cat([layer(a), layer(b)], 1)
    packed = layer(torch.cat([a, b], 1), cu_seqlens=[0, 41, 71])
    assert_close(packed, alone, 1e-12, "packed")
    rows, mask = torch.randn(2, 45, 24).double(), torch.zeros(2, 45)
    rows[0, 4:], mask[0, 4:] = a[0], 1
    rows[1, 3:33], mask[1, 3:33] = b[0], 1
    padded = layer(rows, attention_mask=mask)
    assert_close(torch.cat([padded[:1, 4:], padded[1:, 3:33]], 1), alone, 1e-12, "padded")
    cotangent = torch.randn_like(alone)
    weights = list(layer.parameters())
    got = torch.autograd.grad((packed * cotangent).sum(), weights, allow_unused=True)
    expected = torch.autograd.grad((alone * cotangent).sum(), weights, allow_unused=True)
    for x, y in zip(got, expected):
        if y is not None and y.any():
            assert_close(x, y, 1e-10, "gradient")


def test_a_state_goes_on_where_it_was(layer):
    x = torch.randn(2, 50, 24).double()
    whole = layer(x)
    parts, state = [], None
    for part in x.split([20, 1, 1, 28], 1):
        with torch.no_grad():
            y, state = layer(part, state=state, return_state=True)
        parts.append(y)
    assert_close(torch.cat(parts, 1), whole, 1e-11)
    assert state.position.tolist() == [50, 50]


def test_misuse_is_told(layer):
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, hidden\], got \[3, 24\]"):
        layer(torch.zeros(3, 24).double())
    _, state = layer(torch.zeros(2, 3, 24).double(), return_state=True)
    with pytest.raises(ValueError, match="holds 2 sequences, but 1 are to go on"):
        layer(torch.zeros(1, 3, 24).double(), state=state)
    with pytest.raises(ValueError, match=r"'num_head' is no setting of .*: did you mean 'num_heads'"):
        DeltaNet(24, num_head=2)


@pytest.mark.parametrize("shape", [(1, 9, 3), (2, 7, 4), (3, 1, 2), (2, 3, 9), (5, 2, 2)])
def test_the_short_convolution_piece_by_piece(shape, monkeypatch):
    monkeypatch.setattr(blocks, "PIECE", 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], 4, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
    plain = torch.nn.functional.conv1d(padded, weight[:, None], groups=shape[-1]).transpose(1, 2)
    assert_close(blocks.causal_convolution(x, weight), torch.nn.functional.silu(plain), 1e-12)
    assert torch.autograd.gradcheck(blocks.causal_convolution, (x, weight))


def test_a_tensor_without_data_is_one_piece():
    """Else shapes of long sequences take minutes: each piece is twenty operations of a fake tensor."""
    shape = (2, 1 << 14, 256)
    assert len(list(blocks._pieces(torch.empty(shape)))) > 8
    assert len(list(blocks._pieces(torch.empty(shape, device="meta")))) == 1
    with FakeTensorMode():
        x = torch.empty(shape)
        assert len(list(blocks._pieces(x))) == 1
        assert blocks.causal_convolution(x, torch.empty(256, 4)).shape == shape
