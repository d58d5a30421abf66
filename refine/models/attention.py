"""Full attention as hybrid models use it: grouped key/value heads, norms on queries and keys, partial rotary
positions or none, an output gate.

Whole sequences go through PyTorch's scaled_dot_product_attention, whose memory is linear in T; what continues a
state goes through :func:`~refine.models.prefix_attention.prefix_attention`, which reads the prefix in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refine.models.attention_state import MAX_OWN_TOKENS, AttentionState, AttentionTrace
from refine.models.prefix_attention import prefix_attention

ROPE_TYPES = ("default", "linear", "yarn", "llama3")  # those whose frequencies do not depend on the length


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) on the first ``size`` of each head, half rotation.

    Frequencies, angles, sines and cosines are in float32 whatever the model's dtype.
    """

    size: int
    config: object  # names theta, and the scaling of the frequencies where there is one

    def __post_init__(self):
        kind = self.config.rope_parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not implemented, only {', '.join(ROPE_TYPES)} are")

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # [N, T]
        """Cosines and sines, [N, 1, T, size / 2] float32 each."""
        frequency, scale = self._frequencies(positions.device)
        angle = positions[:, None, :, None].float() * frequency
        return angle.cos() * scale, angle.sin() * scale

    def _frequencies(self, device: torch.device) -> tuple[torch.Tensor, float]:
        parameters = self.config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            return ROPE_INIT_FUNCTIONS[kind](self.config, device)
        exponent = torch.arange(0, self.size, 2, device=device, dtype=torch.float32) / self.size
        return 1.0 / parameters["rope_theta"] ** exponent, 1.0

    def rotate(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Turn the pairs (x_i, x_{i + size/2}) of ``x`` [N, heads, T, head_dim] by their angles."""
        cos, sin = angles
        a, b, rest = x.split((self.size // 2, self.size // 2, x.shape[-1] - self.size), dim=-1)
        turned = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
        return torch.cat([*turned, rest], dim=-1)


class FullAttention(nn.Module):
    """One token mixer: softmax attention to all tokens so far.

    Args:
        config: gives ``hidden_size``, ``num_attention_heads``, ``num_key_value_heads``, ``head_dim``,
            ``attention_bias``.
        q_norm, k_norm: over one head, or over all heads together.
        rotary: how positions are told; None: they are not.
        gated: ``q_proj`` gives a gate beside each head's query; the output is multiplied by its sigmoid.
    """

    def __init__(self, config, q_norm: nn.Module, k_norm: nn.Module, rotary: Rotary | None, gated: bool):
        super().__init__()
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or hidden // heads
        self.gated, self.rotary = gated, rotary
        if heads % groups:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads: got {heads} and {groups}"
            )
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden, heads * self.head_dim * (2 if gated else 1), bias=bias)
        self.k_proj = nn.Linear(hidden, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(
        self,
        x: torch.Tensor,  # [B, T, hidden]
        state: AttentionState | None = None,
        lengths: torch.Tensor | None = None,  # [B]: only the first tokens of a row are read
        use_cache: bool = False,
        state_stride: int | None = None,  # a trace is wanted; it costs nothing whatever the number
    ) -> tuple[torch.Tensor, AttentionState | None, AttentionTrace | None]:
        positions = torch.arange(x.shape[1], device=x.device)[None]  # [1, T]
        if state is not None:
            positions = state.position()[:, None] + positions
        q, k, v, gate = self._project(x, positions)
        if state is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            after = AttentionState((k,), (v,))
        else:
            after = state.with_own(k, v)
            o = prefix_attention(
                q, state.keys, state.values, state.rows, state.read, after.own_k, after.own_v
            )
        trace = None
        if state_stride is not None:
            whole = after.settle()
            trace = AttentionTrace(whole.keys, whole.values, positions[:, 0].expand(len(x)))
        if not use_cache:
            after = None
        elif lengths is not None:
            after = after.settle((positions[:, 0] + lengths).expand(len(x)))
        elif after.own_tokens > MAX_OWN_TOKENS:
            after = after.settle()
        return self._merge(o, gate), after, trace

    def _project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Queries [B, H, T, d], keys and values [B, G, T, d], the gate [B, T, H d] or None."""
        q, gate = self.q_proj(x), None
        if self.gated:
            q, gate = q.unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
            gate = gate.flatten(-2)
        q, k = self._normed(q, self.q_norm), self._normed(self.k_proj(x), self.k_norm)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).contiguous()
        if self.rotary is not None:
            angles = self.rotary.angles(positions)
            q, k = self.rotary.rotate(q, angles), self.rotary.rotate(k, angles)
        return q, k, v, gate

    def _normed(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        """[B, heads, T, d] of [B, T, heads d] or [B, T, heads, d]."""
        over_all_heads = norm.weight.numel() != self.head_dim
        if over_all_heads:
            x = norm(x.flatten(2))
        x = x if x.ndim == 4 else x.unflatten(-1, (-1, self.head_dim))
        return (x if over_all_heads else norm(x)).transpose(1, 2)

    def _merge(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        o = o.transpose(1, 2).flatten(2)
        return self.o_proj(o if gate is None else o * gate.sigmoid())
