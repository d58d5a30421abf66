"""Random weights from which in-context recall is learnt quickly: a mimetic initialisation for the delta rule.

A layer that recalls does one thing: at token b it looks for the place where b stood before and brings back what
followed. From independent random weights small models take very long to find this; a state-space model that
begins near it learns recall at once (Trockman et al., "Mimetic Initialization Helps State Space Models Learn to
Recall", arXiv 2410.11135). For the delta rule, beginning near it means:

- queries and keys look at tokens the same way: ``W_q = W_k``;
- the keys' convolution takes the token before, the queries' and the values' the token itself, so that the value
  of a token is stored under its predecessor;
- the output brings a value back as what it was: ``W_v`` orthogonal and ``W_o`` its transpose;
- where the state decays, it does so slowly: over hundreds of tokens instead of a handful.

Where a layer has to see something that is the same for all tokens, the embeddings get a component in common, which
the head does not see (it adds the same to every logit):

- a hybrid's delta-rule layers have output gates, which at the start multiply what is recalled by random numbers:
  they look at the common component alone and begin open;
- LaCT has no convolution: the first layer's window attention looks at the common component alone, with queries that
  are turned by one position, so that it brings the token before, in a rotation of the embeddings of its own; the
  later layers' keys look for it there, and their queries for the token itself. Their fast weights ``w1`` begin
  small and the rates larger, so that they soon hold what was read.

In these two the MLPs begin quiet. Of 32 random tokens read again the next one is then right in 50 to 90 % of places
at initialisation (hidden 192, 4 layers, 5,120 entries; LaCT within its window). A hybrid's attention layers stay as
they are.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from refine.models.attention import FullAttention
from refine.models.blocks import draw_decay_
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.delta_net import DeltaNetAttention
from refine.models.gated_delta_net import GatedDeltaNetAttention
from refine.models.grouped_delta import GroupedGatedDelta
from refine.models.lact import BASE_RATE, LaCTAttention

COMMON = 0.5  # the embeddings' common component, in units of the others' standard deviation
QUIET = 0.01  # of the MLPs' outputs, in hybrids and LaCT
OPEN = 3.0  # what the gates of a hybrid begin with, before SiLU
SLOW = {"largest_rate": 1.0, "steps": (1e-4, 1e-2)}  # of the decay
AHEAD = 50.0  # the score by which LaCT's first layer prefers the token before, over pairs in no phase
FAST = 0.05  # radians a token: only rotary pairs that turn faster tell neighbours apart
SHARP = 2.0  # size of later layers' queries and keys
SMALL, RATE, HALF_OPEN = 0.05, 1e-2, 0.5  # of w1; the learning rates; the fast weights' gate before SiLU


@torch.no_grad()
def mimetic_init_(model: FastWeightForCausalLM, strength: float | None = None) -> FastWeightForCausalLM:
    """Put the token mixers of ``model`` near recall, in place.

    Args:
        model: freshly initialised: of delta-rule layers, a hybrid of them and attention, or a LaCT.
        strength: how much of what is recalled a layer adds to the residual stream, in units of an embedding;
            default: 4 for delta-rule models, else 8.

    Raises:
        ValueError: a layer is of another kind, its convolution is narrower than two tokens, a delta-rule model has
            an output gate, or a LaCT one layer alone, ``attn_qk_norm`` or no ``learnable_ttt_scale``.
    """
    mixers = [_mixer(layer) for layer in model.model.layers]
    for mixer in mixers:
        _check(mixer, len(mixers))
    shared = any(isinstance(mixer, GroupedGatedDelta | LaCTAttention) for mixer in mixers)
    scale = model.config.initializer_range * ((8.0 if shared else 4.0) if strength is None else strength)
    if shared:
        common = _share(model.get_input_embeddings().weight, model.config.initializer_range)
        for name, weight in model.named_parameters():
            if ".mlp." in name and "down_proj" in name:
                weight.mul_(QUIET)
    if isinstance(mixers[0], LaCTAttention):
        _init_lact(mixers, common, scale)
        return model
    for mixer in mixers:
        if isinstance(mixer, GroupedGatedDelta):
            _init_grouped(mixer, common, scale)
        elif isinstance(mixer, DeltaNetAttention):
            _init_delta(mixer, scale)
    return model


def _mixer(layer: nn.Module) -> nn.Module | None:
    names = ("attn", "linear_attn", "self_attn")
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)


def _check(mixer: nn.Module | None, layers: int) -> None:
    if isinstance(mixer, FullAttention):
        return
    if isinstance(mixer, LaCTAttention):
        if layers < 2 or mixer.q_norm is not None or mixer.ttt_scale_proj is None:
            raise ValueError(
                "mimetic_init needs a LaCT of at least two layers, with attn_qk_norm=false and "
                "learnable_ttt_scale=true"
            )
        return
    if not isinstance(mixer, DeltaNetAttention | GroupedGatedDelta) or mixer.conv_size < 2:
        raise ValueError("mimetic_init needs delta-rule layers with convolutions of at least two tokens")
    if isinstance(mixer, DeltaNetAttention) and mixer.g_proj is not None:
        raise ValueError("mimetic_init needs use_gate=false: a random output gate hides what is recalled")


def _share(embeddings: torch.Tensor, scale: float) -> torch.Tensor:
    """Give all embeddings [entries, hidden] the same component, in place: its direction, [hidden], as a layer sees
    it behind its norm: of length one over what it finds there."""
    hidden = embeddings.shape[1]
    direction = torch.full((hidden,), hidden**-0.5, dtype=embeddings.dtype, device=embeddings.device)
    embeddings -= (embeddings @ direction)[:, None] * direction
    embeddings += COMMON * scale
    return direction * math.sqrt((1 + COMMON**2) / hidden) / COMMON


def _blind(rows: int, common: torch.Tensor) -> torch.Tensor:
    """[rows, hidden]: an orthogonal matrix that does not see the common component."""
    weight = nn.init.orthogonal_(common.new_empty(rows, len(common)))
    direction = common / common.norm()
    return weight - (weight @ direction)[:, None] * direction


def _init_delta(mixer: DeltaNetAttention, scale: float) -> None:
    nn.init.orthogonal_(mixer.k_proj.weight)
    mixer.q_proj.weight.copy_(mixer.k_proj.weight)
    nn.init.orthogonal_(mixer.v_proj.weight)
    mixer.o_proj.weight.copy_(mixer.v_proj.weight.T)
    mixer.o_proj.weight.mul_(scale)
    _init_taps(mixer.q_conv1d.weight, -1)
    _init_taps(mixer.k_conv1d.weight, -2)
    _init_taps(mixer.v_conv1d.weight, -1)
    if isinstance(mixer, GatedDeltaNetAttention):
        mixer.reset_decay(**SLOW)


def _init_grouped(mixer: GroupedGatedDelta, common: torch.Tensor, scale: float) -> None:
    keys, values = _blind(mixer.key_dim, common), _blind(mixer.value_dim, common)
    mixer.set_projections(keys, keys, values, (OPEN * common).expand(mixer.value_dim, -1))
    mixer.output.weight.copy_(values.T * scale)
    parts = mixer.conv1d.weight.split([mixer.key_dim, mixer.key_dim, mixer.value_dim])
    for part, tap in zip(parts, (-1, -2, -1)):
        _init_taps(part, tap)
    draw_decay_(mixer.A_log, mixer.dt_bias, (1e-3, SLOW["largest_rate"]), SLOW["steps"])


def _init_taps(weight: torch.Tensor, tap: int) -> None:
    """[channels, 1, width]: near the input of one place alone."""
    nn.init.normal_(weight, std=0.02)
    weight[:, 0, tap] += 1.0


def _init_lact(mixers: list[LaCTAttention], common: torch.Tensor, scale: float) -> None:
    first, *later = mixers
    config, hidden = first.config, len(common)
    elsewhere = _blind(hidden, common)  # where the token before is put
    query, key = (x.to(common) for x in _looking_back(first.head_dim, config.rope_theta))
    values = _blind(hidden, common)
    heads = hidden // first.head_dim
    rows = (query.repeat(heads)[:, None] * common, key.repeat(heads)[:, None] * common, values)
    first.qkv.weight.copy_(torch.cat(rows))
    first.o_proj.weight.copy_(elsewhere @ values.T * config.initializer_range)
    _init_constant(first.ttt_scale_proj, 0.0)
    for mixer in later:
        look, values = SHARP * _blind(hidden, common), _blind(hidden, common)
        mixer.qkv.weight.copy_(torch.cat([look, look @ elsewhere.T, values]))
        mixer.o_proj.weight.copy_(values.T * scale)
        mixer.w1.mul_(SMALL)
        _init_constant(mixer.ttt_scale_proj, HALF_OPEN)
        _init_constant(mixer.lr_proj, math.log(math.expm1(RATE)) - math.log(math.expm1(BASE_RATE)))


def _looking_back(size: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a key, [size] each, whose score after rotation is largest where the key stands one token before
    the query: pairs (i, i + size / 2) turn by ``theta^(-2 i / size)`` a token, and the query begins one late."""
    turns = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    fast = (turns > FAST).double()
    length = torch.sqrt(AHEAD * size**0.5 / 2 / fast.sum()) * fast
    cos, sin = turns.cos(), turns.sin()
    query = torch.cat([length * cos + length * sin, length * cos - length * sin])
    return query, torch.cat([length, length])


def _init_constant(linear: nn.Linear, value: float) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, value)
