"""LaCT (Zhang et al., "Test-Time Training Done Right", arXiv 2505.23884): large-chunk test-time training.

A token mixer of two parts on the same projections: attention over a sliding window, and a SwiGLU network whose
weights are updated by every chunk of tokens (:func:`refine_kernels.chunk_lact`). Names, shapes and arithmetic are
those of the published checkpoints (``model_type: lact_swiglu``), so they load as they are.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from refine.models.blocks import RMSNorm, is_loaded
from refine.models.body import FastWeightModel
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.config import FastWeightConfig, check_numbers, check_sizes
from refine.models.lact_groups import LaCTGroups, LaCTGroupsTrace, into_packed, places, row_groups
from refine.models.lact_state import LaCTLayerState, LaCTMemory, LaCTSettings, LaCTTokens, LaCTTrace
from refine.models.layout import PLAIN, BatchLayout
from refine.models.registry import register_model
from refine.models.rotary import rotary_angles, rotate
from refine.models.window_attention import window_attention
from refine.models.wrapped import plain_weight
from refine_kernels.lact import LaCTWeights, Widths, lact_apply, lact_finish, lact_prepare, lact_scan
from refine_kernels.lact.layout import count_entries

BASE_RATE = 1e-3  # softplus(BASE_RATE_SHIFT), the learning rate where lr_proj gives 0
BASE_RATE_SHIFT = math.log(math.expm1(BASE_RATE))
NORM_EPS = 1e-5


class LaCTConfig(FastWeightConfig):
    """Configuration of a LaCT model; the keys are those of published ``config.json`` files, the defaults those of
    the public class: fast weights of full rank (``w0_w2_low_rank`` -1) and ``rope_theta`` 1e4, which the published
    760M sets to 32 and 1e6.

    ``window_size`` and ``lact_chunk_size`` are independent of one another, in decoding too.
    """

    model_type = "lact_swiglu"
    only_implemented = FastWeightConfig.only_implemented | {
        "lr_dim": (1,),
        "lr_parameterization": ("mamba",),
        "ttt_loss_type": ("dot_product",),
    }

    def __init__(
        self,
        hidden_size: int = 1536,
        num_hidden_layers: int = 24,
        num_attn_heads: int = 24,
        num_lact_heads: int = 4,
        inter_multi: float = 1,
        qkv_bias: bool = False,
        attn_qk_norm: bool = False,
        qkv_silu: bool = True,
        no_v_silu: bool = False,
        lact_chunk_size: int = 2048,
        window_size: int = 2048,
        use_muon: bool = False,
        use_momentum: bool = True,
        learnable_ttt_scale: bool = True,
        ttt_prenorm: bool = False,
        ttt_nope: bool = False,
        w0_w2_low_rank: int = -1,
        fw_init_gain: float = 0.5,
        rope_theta: float = 1e4,
        **kwargs,
    ):
        check_sizes(
            self.model_type, hidden_size=hidden_size, num_attn_heads=num_attn_heads,
            num_lact_heads=num_lact_heads, lact_chunk_size=lact_chunk_size, window_size=window_size,
            w0_w2_low_rank=None if w0_w2_low_rank in (-1, 0) else w0_w2_low_rank,
        )  # fmt: skip
        check_numbers(self.model_type, inter_multi=inter_multi, rope_theta=rope_theta)
        check_numbers(self.model_type, least=0, fw_init_gain=fw_init_gain)
        for name, heads in (("num_attn_heads", num_attn_heads), ("num_lact_heads", num_lact_heads)):
            if hidden_size % heads:
                raise ValueError(f"hidden_size must be a multiple of {name}: got {hidden_size} and {heads}")
        if (hidden_size // num_attn_heads) % 2:
            raise ValueError(
                "hidden_size / num_attn_heads must be even, as positions are rotated in pairs: "
                f"got {hidden_size} / {num_attn_heads}"
            )
        if not ttt_nope and num_attn_heads % num_lact_heads:
            raise ValueError(
                "num_attn_heads must be a multiple of num_lact_heads, as positions are rotated by attention heads: "
                f"got {num_attn_heads} and {num_lact_heads}"
            )
        if int(hidden_size // num_lact_heads * inter_multi) < 1:
            raise ValueError(f"inter_multi must leave at least one hidden unit, got {inter_multi!r}")
        self.num_attn_heads = num_attn_heads
        self.num_lact_heads = num_lact_heads
        self.inter_multi = inter_multi
        self.qkv_bias = qkv_bias
        self.attn_qk_norm = attn_qk_norm
        self.qkv_silu = qkv_silu
        self.no_v_silu = no_v_silu
        self.lact_chunk_size = lact_chunk_size
        self.window_size = window_size
        self.use_muon = use_muon
        self.use_momentum = use_momentum
        self.learnable_ttt_scale = learnable_ttt_scale
        self.ttt_prenorm = ttt_prenorm
        self.ttt_nope = ttt_nope
        self.w0_w2_low_rank = w0_w2_low_rank
        self.fw_init_gain = fw_init_gain
        self.rope_theta = rope_theta
        super().__init__(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **kwargs)

    @property
    def widths(self) -> Widths:
        """Sizes of one head's fast weight."""
        width = self.hidden_size // self.num_lact_heads
        return Widths(width, int(width * self.inter_multi), width)


class LowRankFastWeight(nn.Module):
    """An initial fast weight a head: ``w_left w_right + I / 2``, [H, rows, columns] of rank ``rank`` + identity."""

    def __init__(self, heads: int, rows: int, columns: int, rank: int, gain: float):
        super().__init__()
        self.w_left = nn.Parameter(torch.empty(heads, rows, rank))
        self.w_right = nn.Parameter(torch.empty(heads, rank, columns))
        self.gain = gain
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """Draw both factors anew, except one that has been loaded."""
        for weight in (self.w_left, self.w_right):
            if not is_loaded(weight):
                nn.init.normal_(weight, std=self.gain * weight.shape[-1] ** -0.5)

    def forward(self) -> torch.Tensor:
        eye = torch.eye(
            self.w_left.shape[1], self.w_right.shape[2], dtype=self.w_left.dtype, device=self.w_left.device
        )
        return self.w_left @ self.w_right + 0.5 * eye


class LaCTAttention(nn.Module):
    """One token mixer: window attention plus large-chunk fast weights on the same queries, keys and values."""

    takes_cu_seqlens: ClassVar[bool] = True

    def __init__(self, config: LaCTConfig):
        super().__init__()
        hidden, heads, widths = config.hidden_size, config.num_lact_heads, config.widths
        self.config = config
        self.head_dim = hidden // config.num_attn_heads
        self.settings = LaCTSettings(widths, config.lact_chunk_size, config.window_size, config.use_muon)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=config.qkv_bias)
        self.q_norm = RMSNorm(hidden, NORM_EPS) if config.attn_qk_norm else None
        self.k_norm = RMSNorm(hidden, NORM_EPS) if config.attn_qk_norm else None
        self.qk_scale = nn.Parameter(torch.ones(hidden, 2))
        self.qk_offset = nn.Parameter(torch.zeros(hidden, 2))
        if config.w0_w2_low_rank > 0:
            shape = (heads, widths.dh, widths.dk, config.w0_w2_low_rank, config.fw_init_gain)
            self.w0, self.w2 = LowRankFastWeight(*shape), LowRankFastWeight(*shape)
        else:
            self.w0 = nn.Parameter(torch.empty(heads, widths.dh, widths.dk))
            self.w2 = nn.Parameter(torch.empty(heads, widths.dh, widths.dk))
        self.w1 = nn.Parameter(torch.empty(heads, widths.dv, widths.dh))
        self.lr_proj = nn.Linear(hidden, 3 * heads)
        self.momentum_proj = nn.Sequential(nn.Linear(hidden, heads)) if config.use_momentum else None
        self.ttt_scale_proj = nn.Linear(hidden, heads) if config.learnable_ttt_scale else None
        self.ttt_norm = RMSNorm(widths.dv, NORM_EPS)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """Draw this module's own initial fast weights anew, except what has been loaded; scale 1, offset 0."""
        for name, weight in self.named_parameters(recurse=False):
            if is_loaded(weight):
                continue
            if name == "qk_scale":
                nn.init.ones_(weight)
            elif name == "qk_offset":
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, hidden]
        state: LaCTLayerState | None = None,
        layout: BatchLayout = PLAIN,
        use_cache: bool = False,
        state_stride: int | None = None,  # a trace is wanted; its states are one a chunk whatever the number
    ) -> tuple[torch.Tensor, LaCTLayerState | None, LaCTTrace | None]:
        if layout.packed:
            return self._read_packed(x, state, layout, use_cache, state_stride)
        if isinstance(state, LaCTGroups):
            return self._read_groups(x, state, layout, use_cache, state_stride)
        read = layout.tokens_read(x)  # [N]
        start = torch.zeros_like(read) if state is None else state.position
        q, fast_q, new = self._project(x, layout.positions(x, start))
        short = self.settings.max_own_tokens
        if state is not None and layout.plain and state_stride is None and x.shape[1] <= short:
            if state.own_tokens + x.shape[1] > short:
                state = state.settle()
            attended, o, after = state.read(q, fast_q, new)
            return self._merge(x, attended, o), after if use_cache else None, None

        state = None if state is None else state.settle()
        if state is None or bool((start == start[0]).all()):
            attended, o, trace = self._read_sequences(q, fast_q, new, state, start)
        elif state_stride is None:
            return self._read_apart(x, state, layout, use_cache)
        else:
            raise ValueError("state_stride needs rows that have read equally many tokens")
        after = None
        if use_cache:
            after = trace.gather(torch.arange(len(read), device=x.device), read).settle()
        return self._merge(x, attended, o), after, trace if state_stride is not None else None

    def _read_packed(self, x, state, layout: BatchLayout, use_cache, state_stride):
        """Packed documents: projections have no padding; window and chunks see one document a row."""
        if state is not None:
            y, after, trace = self(layout.to_rows(x), state, layout.as_rows(), use_cache, state_stride)
            return layout.to_packed(y), after, trace
        start = torch.zeros_like(layout.document_lengths)
        q, fast_q, new = self._project(x, layout.positions(x, start))
        groups, outputs = row_groups(layout), []
        for group in groups:
            alike = start[group.documents]
            rows = group.rows(q), group.rows(fast_q, 2), new.map(group.rows)
            outputs.append(self._read_sequences(*rows, None, alike))
        attended, o, traces = (list(column) for column in zip(*outputs))
        where = places([group.documents for group in groups])
        after = trace = None
        if use_cache:
            counts = [layout.document_lengths[group.documents] for group in groups]
            ends = (t.gather(torch.arange(len(n), device=n.device), n) for t, n in zip(traces, counts))
            after = LaCTGroups([state.settle() for state in ends], *where)
        if state_stride is not None:
            trace = LaCTGroupsTrace(traces, *where)
        y = self._merge(x, into_packed(groups, attended), into_packed(groups, o, 2))
        return y, after, trace

    def _read_groups(self, x, state: LaCTGroups, layout: BatchLayout, use_cache, state_stride):
        """Rows whose states lie in several memories: those of one memory go together."""
        if state_stride is not None:
            raise ValueError("state_stride needs rows that have read equally many tokens")
        order, outputs, parts = [], [], []
        for rows, part in state.split():
            alike = PLAIN if layout.lengths is None else BatchLayout(layout.lengths[rows])
            y, after, _ = self(x[rows], part, alike, use_cache)
            order.append(rows)
            outputs.append(y)
            parts.append(after)
        y = torch.cat(outputs)[torch.cat(order).argsort()]
        return y, LaCTGroups(parts, *places(order)) if use_cache else None, None

    def _read_sequences(self, q, fast_q, new, state, start) -> tuple[torch.Tensor, torch.Tensor, LaCTTrace]:
        """Whole sequences of T tokens, from the start or from states that have read equally many tokens."""
        batch, heads, tokens = fast_q.shape[:3]
        if state is None:
            everything, opened = new, 0
            weights, norms = self._initial_weights(batch, fast_q)
            window_origin = chunk_origin = start
        else:
            memory = state.memory
            everything, opened = memory.tokens.then(new), memory.tokens.fast_k.shape[2]
            weights, norms = memory.weights.map(lambda w: w[:, 0]), memory.norms
            window_origin, chunk_origin = memory.window_origin, memory.chunk_origin
        attended = window_attention(q, everything.keys, everything.values, self.settings.window)
        widths, chunk = self.settings.widths, self.settings.chunk_size
        rates = everything.rates.flatten(0, 1).split(1, dim=-1)
        stack = lact_scan(
            weights, norms.repeat(batch, 1), everything.fast_k.flatten(0, 1), everything.fast_v.flatten(0, 1),
            *rates, widths=widths, chunk_size=chunk, updates=count_entries(opened + tokens, chunk) - 1,
            use_muon=self.settings.use_muon,
        )  # fmt: skip
        o = lact_apply(stack.applied, fast_q.flatten(0, 1), widths=widths, chunk_size=chunk, offset=opened)
        memory = LaCTMemory(everything, stack, norms, window_origin, chunk_origin)
        return attended, o.unflatten(0, (batch, heads)), LaCTTrace(memory, self.settings, start)

    def _read_apart(self, x, state, layout, use_cache):
        """Many tokens for rows that have read differently many: those that agree go together."""
        parts, order, outputs = [], [], []
        for start in state.position.unique().tolist():
            rows = (state.position == start).nonzero()[:, 0]
            alike = PLAIN if layout.lengths is None else BatchLayout(layout.lengths[rows])
            y, after, _ = self(x[rows], state.select(rows), alike, use_cache)
            order.append(rows)
            outputs.append(y)
            parts.append(after)
        back = torch.cat(order).argsort()
        return torch.cat(outputs)[back], join_states(parts, back) if use_cache else None, None

    def _project(
        self, x: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, LaCTTokens]:
        """Window queries [B, T, heads, head_dim], fast queries [B, H, T, D], and what is kept of the tokens."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rotary_angles(position, self.head_dim, self.config.rope_theta)
        fast_q, fast_k, fast_v = lact_prepare(
            q,
            k,
            v,
            self.qk_scale,
            self.qk_offset,
            None if self.config.ttt_nope else (cos[..., 0, :], sin[..., 0, :]),
            num_heads=self.config.num_lact_heads,
            silu=self.config.qkv_silu,
            v_silu=self.config.qkv_silu and not self.config.no_v_silu,
        )
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", d=self.head_dim) for z in (q, k, v))
        new = LaCTTokens(rotate(k, (cos, sin)), v, fast_k, fast_v, self._rates(x))
        return rotate(q, (cos, sin)), fast_q, new

    def _rates(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, T, 3 or 4] in float32 at least: the rates of w0, w1 and w2, and the momentum's."""
        exact = torch.promote_types(x.dtype, torch.float32)
        rates = F.softplus(self.lr_proj(x).to(exact) + BASE_RATE_SHIFT)
        rates = rearrange(rates, "b t (h j) -> b h t j", j=3)
        if self.momentum_proj is None:
            return rates
        momentum = self.momentum_proj(x).to(exact).sigmoid()
        return torch.cat([rates, rearrange(momentum, "b t h -> b h t 1")], dim=-1)

    def _initial_weights(self, batch: int, like: torch.Tensor) -> tuple[LaCTWeights, torch.Tensor]:
        """The weights before any token, [B H, size], and the norms of their rows, [H, R]."""
        low_rank = isinstance(self.w0, LowRankFastWeight)
        w0, w2 = (self.w0(), self.w2()) if low_rank else (self.w0, self.w2)
        widths = self.settings.widths
        initial = widths.pack(w0, self.w1, w2).to(torch.promote_types(like.dtype, torch.float32))
        weights = LaCTWeights.first(
            initial.repeat(batch, 1), self.config.ttt_prenorm, self.momentum_proj is not None
        )
        return weights, widths.row_norms(initial)

    def _merge(self, x: torch.Tensor, attended: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """[B, T, hidden] of the attention's output [B, T, heads, head_dim] and the fast weights' [B, H, T, D]."""
        gate = None if self.ttt_scale_proj is None else self.ttt_scale_proj(x)
        y = lact_finish(o, attended.flatten(-2), plain_weight(self.ttt_norm), gate, eps=NORM_EPS)
        return self.o_proj(y)


def join_states(parts: list[LaCTLayerState], order: torch.Tensor) -> LaCTLayerState:
    """States in memories of their own, put into one, row i from the ``order[i]``-th of all."""
    length = max(len(part.memory.tokens) for part in parts)
    opened = max(part.memory.tokens.fast_k.shape[2] for part in parts)

    def pad(x: torch.Tensor, dim: int) -> torch.Tensor:
        # window columns end at the position, so room is made before them; an open chunk's begin at its start
        missing = (length if dim == 1 else opened) - x.shape[dim]
        shape = list(x.shape)
        shape[dim] = missing
        room = x.new_zeros(shape)
        return torch.cat([room, x] if dim == 1 else [x, room], dim)

    tokens = [part.memory.tokens.map(pad) for part in parts]
    tokens = LaCTTokens(
        *(torch.cat([getattr(t, n) for t in tokens])[order] for n in LaCTTokens.__annotations__)
    )
    heads = parts[0].memory.norms.shape[0]
    stacks = zip(*(part.memory.weights.tensors() for part in parts))
    weights = (
        None if xs[0] is None else torch.cat([x.unflatten(0, (-1, heads)) for x in xs])[order].flatten(0, 1)
        for xs in stacks
    )
    position = torch.cat([part.position for part in parts])[order]
    chunk_origin = torch.cat([part.memory.chunk_origin for part in parts])[order]
    memory = LaCTMemory(tokens, LaCTWeights(*weights), parts[0].memory.norms, position - length, chunk_origin)
    return LaCTLayerState(memory, parts[0].settings, None, position)


class LaCTModel(FastWeightModel):
    """LaCT without a head. See :class:`FastWeightModel` for what ``forward`` takes."""

    config_class = LaCTConfig
    mixers: ClassVar = {"linear_attention": LaCTAttention}


@register_model(
    "lact",
    tiny={
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "lact_chunk_size": 256,
        "window_size": 128,
        "w0_w2_low_rank": 16,
        "intermediate_size": 384,
    },
)
class LaCTForCausalLM(FastWeightForCausalLM):
    """LaCT with a language-model head. See :class:`FastWeightForCausalLM` for what ``forward`` takes."""

    config_class = LaCTConfig
    body_class = LaCTModel
