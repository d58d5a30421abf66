"""DeltaNet (Yang et al., arXiv 2406.06484): a linear-attention model whose state is written by the delta rule.

Names, shapes and arithmetic are those of the published checkpoints (``model_type: delta_net``), so they load
as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange
from torch import nn

from refine.models.blocks import GatedRMSNorm, RMSNorm, ShortConvolution, last_inputs
from refine.models.body import FastWeightModel
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.config import FastWeightConfig, check_numbers, check_sizes
from refine.models.layout import PLAIN, BatchLayout
from refine.models.registry import register_model
from refine.models.wrapped import plain_weight
from refine_kernels import chunk_delta_rule, delta_net_decode, recurrent_delta_rule

_MAX_VALUE_SIZE = 256  # of one call of the delta rule
_RECURRENT_LENGTH = 4  # without a gradient, up to this many tokens go through the decode path


class DeltaNetConfig(FastWeightConfig):
    """Configuration of a DeltaNet; the keys are those of published ``config.json`` files."""

    model_type = "delta_net"
    only_implemented = FastWeightConfig.only_implemented | {
        "qk_norm": ("l2",),
        "qk_activation": ("silu",),
        "use_beta": (True,),
        "use_output_norm": (True,),
        "norm_first": (False,),
    }

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        num_heads: int = 16,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_size: int = 4,
        use_gate: bool = False,
        allow_neg_eigval: bool = False,
        **kwargs,
    ):
        check_sizes(self.model_type, hidden_size=hidden_size, num_heads=num_heads, conv_size=conv_size)
        check_numbers(self.model_type, expand_k=expand_k, expand_v=expand_v)
        self.num_heads = num_heads
        self.expand_k = expand_k
        self.expand_v = expand_v
        self.conv_size = conv_size
        self.use_gate = use_gate
        self.allow_neg_eigval = allow_neg_eigval
        for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
            width = hidden_size * expand
            if width != int(width) or int(width) % num_heads:
                raise ValueError(
                    f"hidden_size * {name} must be a multiple of num_heads: "
                    f"got {hidden_size} * {expand} with num_heads={num_heads}"
                )
        super().__init__(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **kwargs)

    @property
    def head_k_dim(self) -> int:
        """Key size of one head, K."""
        return int(self.hidden_size * self.expand_k) // self.num_heads

    @property
    def head_v_dim(self) -> int:
        """Value size of one head, V."""
        return int(self.hidden_size * self.expand_v) // self.num_heads


@dataclass
class DeltaRuleState:
    """One layer's memory of N sequences: the fast weight and the last convolution inputs.

    ``rows`` makes selection free: N sequences may share the tensors of fewer parents, and the first
    continuation reads its parent through the index and writes tensors of its own (copy on write).
    """

    fast_weight: torch.Tensor  # [P, H, K, V] float32
    tails: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v: [P, W-1, D], before the convolution
    rows: torch.Tensor | None = None  # [N] index into P; None: N = P, in order

    fixed_size: ClassVar[bool] = True
    graph_capturable: ClassVar[bool] = True

    def select(self, rows: torch.Tensor) -> DeltaRuleState:
        """The states of ``rows``, sharing these tensors until they are continued."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def detach(self) -> DeltaRuleState:
        """The same state outside the autograd graph."""
        return DeltaRuleState(self.fast_weight.detach(), tuple(t.detach() for t in self.tails), self.rows)

    def own_fast_weight(self) -> torch.Tensor:
        """[N, H, K, V]: each sequence's own copy."""
        return self.fast_weight if self.rows is None else self.fast_weight[self.rows]

    def own_tails(self) -> tuple[torch.Tensor, ...]:
        """q, k, v: [N, W-1, D], each sequence's own copy."""
        return self.tails if self.rows is None else tuple(t[self.rows] for t in self.tails)


@dataclass
class DeltaRuleTrace:
    """What a layer keeps of a pass over N true sequences: all of it is alive for the backward anyway, except the
    states at the stride.

    The state at a position inside a stride follows from the state at the stride's start and the keys, values
    and rates in between, so no projection, convolution or MLP is run again. A sequence is a row of the batch, or a
    document of a packed row.
    """

    states: torch.Tensor  # [N, ceil(longest/stride), H, K, V] float32, before tokens 0, stride, 2 stride, ...
    key: torch.Tensor  # [B, T, H, K], after convolution and activation, before the l2 norm
    value: torch.Tensor  # [B, T, H, V]
    beta: torch.Tensor  # [B, T, H]
    log_decay: torch.Tensor | None  # [B, T, H] float32
    conv_inputs: tuple[torch.Tensor, ...]  # one or several, as the layer convolves: [B, T, D] each
    tails: tuple[torch.Tensor | None, ...]  # of each, [N, W-1, D], what came before; None at a start
    stride: int
    conv_size: int
    cu_seqlens: torch.Tensor | None = None  # [N + 1], of a packed row

    def gather(self, rows: torch.Tensor, positions: torch.Tensor) -> DeltaRuleState:
        """The state after the first ``positions`` [M] tokens of sequences ``rows`` [M]."""
        blocks = -(-self._lengths(rows) // self.stride)
        block = torch.minimum(positions // self.stride, blocks - 1)  # [M]
        start = block * self.stride
        span = min(self.stride, self.key.shape[1])
        token = start[:, None] + torch.arange(span, device=rows.device)  # [M, span]
        read = (token < positions[:, None])[..., None]  # [M, span, 1]
        key, value, beta = (self._take(x, rows, token) for x in (self.key, self.value, self.beta))
        log_decay = None if self.log_decay is None else self._take(self.log_decay, rows, token) * read
        initial = self.states.flatten(0, 1)[rows * self.states.shape[1] + block]
        _, fast_weight = over_value_blocks(
            chunk_delta_rule,
            key,
            key,
            value,
            beta * read,  # a rate of 0 writes nothing, so a token not yet read leaves the state as it is
            g=log_decay,
            initial_state=initial,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        tails = tuple(self._last_inputs(*pair, rows, positions) for pair in zip(self.conv_inputs, self.tails))
        return DeltaRuleState(fast_weight, tails)

    def _last_inputs(self, x, tail, rows, positions) -> torch.Tensor:
        """The W - 1 convolution inputs before ``positions``, some of which may lie in the tail: [M, W-1, D]."""
        count = self.conv_size - 1
        token = positions[:, None] + torch.arange(-count, 0, device=rows.device)  # [M, W-1]
        inside = (token >= 0)[..., None]
        if tail is None:
            return self._take(x, rows, token) * inside
        before = tail[rows[:, None], (token + count).clamp(0, count - 1)]
        return torch.where(inside, self._take(x, rows, token), before)

    def _lengths(self, rows: torch.Tensor) -> torch.Tensor:
        """[M] tokens of each of the sequences."""
        if self.cu_seqlens is None:
            return torch.full_like(rows, self.key.shape[1])
        return self.cu_seqlens.diff()[rows]

    def _take(self, x: torch.Tensor, rows: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Tokens of sequences, clamped into the sequence: [B, T, ...], [M], [M, S] -> [M, S, ...]."""
        first = rows * x.shape[1] if self.cu_seqlens is None else self.cu_seqlens[rows]
        last = self._lengths(rows)[:, None] - 1
        index = first[:, None] + torch.minimum(token.clamp_min(0), last)
        return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def over_value_blocks(rule: Callable, q, k, v, beta, *, initial_state=None, **options) -> tuple:
    """``rule`` on blocks of 256 value columns: columns of a state do not see one another.

    The default Gated DeltaNet has heads of 256 x 512; the kernels take value sizes up to 256.
    """
    if v.shape[-1] <= _MAX_VALUE_SIZE:
        return rule(q, k, v, beta, initial_state=initial_state, **options)
    blocks = []
    for start in range(0, v.shape[-1], _MAX_VALUE_SIZE):
        columns = slice(start, start + _MAX_VALUE_SIZE)
        state = None if initial_state is None else initial_state[..., columns].contiguous()
        blocks.append(rule(q, k, v[..., columns], beta, initial_state=state, **options))
    return tuple(None if parts[0] is None else torch.cat(parts, dim=-1) for parts in zip(*blocks))


class DeltaNetAttention(nn.Module):
    """One token mixer: projections, short convolutions, the delta rule, output norm."""

    takes_cu_seqlens: ClassVar[bool] = True

    def __init__(self, config):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.head_k_dim, self.head_v_dim = config.head_k_dim, config.head_v_dim
        key_dim, value_dim = heads * self.head_k_dim, heads * self.head_v_dim
        self.conv_size = config.conv_size
        self.beta_scale = 2.0 if config.allow_neg_eigval else 1.0
        self.q_proj = nn.Linear(hidden, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden, value_dim, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.q_conv1d = ShortConvolution(key_dim, config.conv_size)
        self.k_conv1d = ShortConvolution(key_dim, config.conv_size)
        self.v_conv1d = ShortConvolution(value_dim, config.conv_size)
        if config.use_gate:
            self.g_proj = nn.Linear(hidden, value_dim, bias=False)
            self.o_norm = GatedRMSNorm(self.head_v_dim, config.norm_eps)
        else:
            self.g_proj = None
            self.o_norm = RMSNorm(self.head_v_dim, config.norm_eps)
        self.o_proj = nn.Linear(value_dim, hidden, bias=False)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor | None:
        """[B, T, H] float32 log-decay of the state, or None where it does not decay (the plain rule)."""
        return None

    def forward(
        self,
        x: torch.Tensor,  # [B, T, hidden]
        state: DeltaRuleState | None = None,
        layout: BatchLayout = PLAIN,
        use_cache: bool = False,
        state_stride: int | None = None,
    ) -> tuple[torch.Tensor, DeltaRuleState | None, DeltaRuleTrace | None]:
        few = x.shape[1] <= _RECURRENT_LENGTH and state_stride is None and not torch.is_grad_enabled()
        few = few and not layout.packed
        if few and state is not None and layout.plain and self.head_v_dim <= _MAX_VALUE_SIZE:
            o, new_state = self._decode(x, state)
            return self._finish(x, o), new_state if use_cache else None, None
        conv_inputs = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        tails = (None, None, None) if state is None else state.own_tails()
        convolutions = self.q_conv1d, self.k_conv1d, self.v_conv1d
        q, k, v = (conv(z, tail, layout) for conv, z, tail in zip(convolutions, conv_inputs, tails))
        q = rearrange(q, "b t (h k) -> b t h k", k=self.head_k_dim)
        k = rearrange(k, "b t (h k) -> b t h k", k=self.head_k_dim)
        v = rearrange(v, "b t (h v) -> b t h v", v=self.head_v_dim)
        beta = self.b_proj(x).sigmoid() * self.beta_scale
        log_decay = self.log_decay(x)
        if (read := layout.is_read(x)) is not None:  # padding neither writes nor decays
            beta = beta * read[..., None]
            log_decay = None if log_decay is None else log_decay * read[..., None]

        trace = None
        if few:
            o, fast_weight = over_value_blocks(
                recurrent_delta_rule,
                q,
                k,
                v,
                beta,
                g=log_decay,
                initial_state=None if state is None else state.fast_weight,
                state_indices=None if state is None else state.rows,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        else:
            o, fast_weight, *states = over_value_blocks(
                chunk_delta_rule,
                q,
                k,
                v,
                beta,
                g=log_decay,
                initial_state=None if state is None else state.own_fast_weight(),
                output_final_state=use_cache,
                state_stride=state_stride,
                cu_seqlens=layout.cu_seqlens,
                use_qk_l2norm_in_kernel=True,
            )
            if state_stride is not None:
                trace = DeltaRuleTrace(
                    states[0], k, v, beta, log_decay, conv_inputs, tails, state_stride, self.conv_size,
                    layout.cu_seqlens,
                )  # fmt: skip

        new_state = None
        if use_cache:
            new_tails = tuple(
                last_inputs(z, tail, layout, self.conv_size - 1) for z, tail in zip(conv_inputs, tails)
            )
            new_state = DeltaRuleState(fast_weight, new_tails)
        return self._finish(x, o), new_state, trace

    def _decode(self, x: torch.Tensor, state: DeltaRuleState) -> tuple[torch.Tensor, DeltaRuleState]:
        """A few tokens without a gradient: everything between projections and norm as one operation."""
        o, fast_weight, tails = delta_net_decode(
            self.q_proj(x),
            self.k_proj(x),
            self.v_proj(x),
            self.b_proj(x),
            tuple(plain_weight(conv).squeeze(1) for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)),
            state.tails,
            state.fast_weight,
            g=self.log_decay(x),
            rows=state.rows,
            beta_scale=self.beta_scale,
        )
        return o, DeltaRuleState(fast_weight, tails)

    def _finish(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """Output norm, with its gate where there is one, and projection: [B, T, H, V] -> [B, T, hidden]."""
        if self.g_proj is not None:
            o = self.o_norm(o, rearrange(self.g_proj(x), "b t (h v) -> b t h v", v=self.head_v_dim))
        else:
            o = self.o_norm(o)
        return self.o_proj(rearrange(o, "b t h v -> b t (h v)"))


class DeltaNetModel(FastWeightModel):
    """DeltaNet without a head. See :class:`FastWeightModel` for what ``forward`` takes."""

    config_class = DeltaNetConfig
    mixers: ClassVar = {"linear_attention": DeltaNetAttention}


@register_model(tiny={"hidden_size": 192, "num_hidden_layers": 4, "num_heads": 3, "intermediate_size": 512})
class DeltaNetForCausalLM(FastWeightForCausalLM):
    """DeltaNet with a language-model head. See :class:`FastWeightForCausalLM` for what ``forward`` takes."""

    config_class = DeltaNetConfig
    body_class = DeltaNetModel
