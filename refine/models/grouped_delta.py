"""The gated delta rule as hybrid models use it: value heads in groups that share a key head, one convolution over
queries, keys and values together, an output norm with a gate.

``S_t = a_t S_{t-1} + k_t (beta_t (v_t - a_t S_{t-1}^T k_t))^T`` a value head, with
``log a_t = -exp(A_log) * softplus(a(x_t) + dt_bias)`` and ``beta_t = sigmoid(b(x_t))`` (times 2 where negative
eigenvalues are allowed). What a layer keeps of a sequence is as in DeltaNet: the fast weights and the last inputs
of the convolution. The families differ in how the projections are named and packed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from refine.models.blocks import (
    GatedRMSNorm,
    ShortConvolution,
    causal_convolution,
    draw_decay_,
    is_loaded,
    last_inputs,
)
from refine.models.delta_net import (
    _MAX_VALUE_SIZE,
    _RECURRENT_LENGTH,
    DeltaRuleState,
    DeltaRuleTrace,
    over_value_blocks,
)
from refine.models.layout import PLAIN, BatchLayout
from refine_kernels import chunk_delta_rule, recurrent_delta_rule

Projections = tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]


class JointConvolution(ShortConvolution):
    """One :class:`ShortConvolution` over several tensors side by side, which are never put together."""

    def forward(
        self,
        parts: tuple[torch.Tensor, ...],  # [B, T, D_i] each, the D_i adding up to the channels
        tails: tuple[torch.Tensor | None, ...],  # [N, W-1, D_i] each
        layout: BatchLayout = PLAIN,
    ) -> tuple[torch.Tensor, ...]:  # [B, T, D_i] each
        weights = self.weight.squeeze(1).split([x.shape[-1] for x in parts])
        return tuple(causal_convolution(*part, layout) for part in zip(parts, weights, tails))


class GroupedGatedDelta(nn.Module):
    """One token mixer. A family's subclass makes the projections and packs them its way (:meth:`_project`)."""

    takes_cu_seqlens: ClassVar[bool] = True

    def __init__(self, config, beta_scale: float = 1.0, norm_eps: float | None = None):
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.head_k_dim, self.head_v_dim = config.linear_key_head_dim, config.linear_value_head_dim
        if self.value_heads % self.key_heads:
            raise ValueError(
                "linear_num_value_heads must be a multiple of linear_num_key_heads: "
                f"got {self.value_heads} and {self.key_heads}"
            )
        self.key_dim, self.value_dim = self.key_heads * self.head_k_dim, self.value_heads * self.head_v_dim
        self.beta_scale = beta_scale
        self.conv_size = config.linear_conv_kernel_dim
        self.conv1d = JointConvolution(2 * self.key_dim + self.value_dim, self.conv_size)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self._make_projections(
            config.hidden_size, GatedRMSNorm(self.head_v_dim, config.rms_norm_eps if norm_eps is None else norm_eps)
        )  # fmt: skip
        self.reset_decay()

    def _make_projections(self, hidden: int, norm: GatedRMSNorm) -> None:
        raise NotImplementedError

    def _project(self, x: torch.Tensor) -> Projections:
        """(q, k, v) before the convolution [B, T, D_i], output gate [B, T, HV, V], b and a [B, T, HV]."""
        raise NotImplementedError

    def set_projections(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> None:
        """Overwrite what :meth:`_project` projects with: [key_dim, hidden] twice, [value_dim, hidden] twice."""
        raise NotImplementedError

    @property
    def output(self) -> nn.Linear:
        """The last projection, [value_dim] -> [hidden]."""
        return self.out_proj

    def _merge(self, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Output norm with its gate, and projection: [B, T, HV, V] twice -> [B, T, hidden]."""
        return self.out_proj(self.norm(o, gate).flatten(2))

    def reset_own_parameters(self) -> None:
        """Draw the decay, unless it has been loaded."""
        if not is_loaded(self.A_log):
            self.reset_decay()

    @torch.no_grad()
    def reset_decay(self) -> None:
        """Draw the decay anew as this family does."""
        self.A_log.uniform_(0.01, 16.0).log_()
        self.dt_bias.fill_(1.0)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, hidden]
        state: DeltaRuleState | None = None,
        layout: BatchLayout = PLAIN,
        use_cache: bool = False,
        state_stride: int | None = None,
    ) -> tuple[torch.Tensor, DeltaRuleState | None, DeltaRuleTrace | None]:
        conv_inputs, gate, b, a = self._project(x)
        tails = (None, None, None) if state is None else state.own_tails()
        q, k, v = self.conv1d(conv_inputs, tails, layout)
        q, k = (z.unflatten(-1, (self.key_heads, -1)) for z in (q, k))
        v = v.unflatten(-1, (self.value_heads, -1))
        beta = b.sigmoid() if self.beta_scale == 1.0 else b.sigmoid() * self.beta_scale
        log_decay = self._log_decay(a)
        if (read := layout.is_read(x)) is not None:  # padding neither writes nor decays
            beta, log_decay = beta * read[..., None], log_decay * read[..., None]

        trace = None
        options = {"g": log_decay, "use_qk_l2norm_in_kernel": True}
        few = x.shape[1] <= _RECURRENT_LENGTH and state_stride is None and not torch.is_grad_enabled()
        if few and not layout.packed and self.head_v_dim <= _MAX_VALUE_SIZE:
            o, fast_weight = recurrent_delta_rule(
                q, k, v, beta,
                initial_state=None if state is None else state.fast_weight,
                state_indices=None if state is None else state.rows,
                output_final_state=True, **options,
            )  # fmt: skip
        else:
            o, fast_weight, *states = over_value_blocks(
                chunk_delta_rule, q, k, v, beta,
                initial_state=None if state is None else state.own_fast_weight(),
                output_final_state=use_cache, state_stride=state_stride, cu_seqlens=layout.cu_seqlens, **options,
            )  # fmt: skip
            if state_stride is not None:
                trace = DeltaRuleTrace(
                    states[0], k, v, beta, log_decay, conv_inputs, tails, state_stride, self.conv_size,
                    layout.cu_seqlens,
                )  # fmt: skip
        after = None
        if use_cache:
            count = self.conv_size - 1
            after = DeltaRuleState(
                fast_weight,
                tuple(last_inputs(z, tail, layout, count) for z, tail in zip(conv_inputs, tails)),
            )
        return self._merge(o, gate), after, trace

    def _log_decay(self, a: torch.Tensor) -> torch.Tensor:
        """[B, T, HV] in float32 at least, at most 0."""
        exact = torch.promote_types(a.dtype, torch.float32)
        return -self.A_log.to(exact).exp() * F.softplus(a.to(exact) + self.dt_bias.to(exact))


class Qwen3_5GatedDelta(GroupedGatedDelta):
    """Queries, keys and values from one projection; gate, b and a from one each."""

    def _make_projections(self, hidden: int, norm: GatedRMSNorm) -> None:
        self.in_proj_qkv = nn.Linear(hidden, 2 * self.key_dim + self.value_dim, bias=False)
        self.in_proj_z = nn.Linear(hidden, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(hidden, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(hidden, self.value_heads, bias=False)
        self.norm = norm
        self.out_proj = nn.Linear(self.value_dim, hidden, bias=False)

    def _project(self, x: torch.Tensor) -> Projections:
        parts = self.in_proj_qkv(x).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        gate = self.in_proj_z(x).unflatten(-1, (self.value_heads, -1))
        return parts, gate, self.in_proj_b(x), self.in_proj_a(x)

    def set_projections(self, q, k, v, gate) -> None:
        self.in_proj_qkv.weight.copy_(torch.cat([q, k, v]))
        self.in_proj_z.weight.copy_(gate)


class Qwen3NextGatedDelta(GroupedGatedDelta):
    """Two projections, packed by key head: [q | k | v of the group | gate of the group] and [b | a]."""

    def _make_projections(self, hidden: int, norm: GatedRMSNorm) -> None:
        self.in_proj_qkvz = nn.Linear(hidden, 2 * (self.key_dim + self.value_dim), bias=False)
        self.in_proj_ba = nn.Linear(hidden, 2 * self.value_heads, bias=False)
        self.norm = norm
        self.out_proj = nn.Linear(self.value_dim, hidden, bias=False)

    def _project(self, x: torch.Tensor) -> Projections:
        group = self.value_heads // self.key_heads
        sizes = (self.head_k_dim, self.head_k_dim, group * self.head_v_dim, group * self.head_v_dim)
        packed = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, -1))
        q, k, v, gate = (part.flatten(2) for part in packed.split(sizes, dim=-1))
        packed = self.in_proj_ba(x).unflatten(-1, (self.key_heads, -1))
        b, a = (part.flatten(2) for part in packed.split((group, group), dim=-1))
        return (q, k, v), gate.unflatten(-1, (self.value_heads, -1)), b, a

    def set_projections(self, q, k, v, gate) -> None:
        groups = (weight.unflatten(0, (self.key_heads, -1)) for weight in (q, k, v, gate))
        self.in_proj_qkvz.weight.copy_(torch.cat(list(groups), 1).flatten(0, 1))


class OlmoHybridGatedDelta(GroupedGatedDelta):
    """A projection each; eigenvalues down to -1 where ``linear_allow_neg_eigval`` is set."""

    def __init__(self, config):
        self.decay = config
        super().__init__(config, beta_scale=2.0 if config.linear_allow_neg_eigval else 1.0, norm_eps=1e-5)

    def _make_projections(self, hidden: int, norm: GatedRMSNorm) -> None:
        self.q_proj = nn.Linear(hidden, self.key_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.key_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.value_dim, bias=False)
        self.a_proj = nn.Linear(hidden, self.value_heads, bias=False)
        self.b_proj = nn.Linear(hidden, self.value_heads, bias=False)
        self.g_proj = nn.Linear(hidden, self.value_dim, bias=False)
        self.o_norm = norm
        self.o_proj = nn.Linear(self.value_dim, hidden, bias=False)

    def _project(self, x: torch.Tensor) -> Projections:
        gate = self.g_proj(x).unflatten(-1, (self.value_heads, -1))
        return (self.q_proj(x), self.k_proj(x), self.v_proj(x)), gate, self.b_proj(x), self.a_proj(x)

    def set_projections(self, q, k, v, gate) -> None:
        for projection, weight in zip((self.q_proj, self.k_proj, self.v_proj, self.g_proj), (q, k, v, gate)):
            projection.weight.copy_(weight)

    @property
    def output(self) -> nn.Linear:
        return self.o_proj

    def _merge(self, o: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.o_norm(o, gate).flatten(2))

    @torch.no_grad()
    def reset_decay(self) -> None:
        """A uniform and softplus(dt_bias) log-uniform between the configuration's bounds."""
        c = self.decay
        draw_decay_(
            self.A_log, self.dt_bias, (max(c.linear_a_log_min, 1e-3), c.linear_a_log_max),
            (c.linear_dt_min, c.linear_dt_max), c.linear_dt_init_floor,
        )  # fmt: skip
