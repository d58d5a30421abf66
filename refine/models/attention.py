"""Full attention as hybrid models use it: grouped key/value heads, norms on queries and keys, partial rotary
positions or none, an output gate.

Whole sequences go through PyTorch's scaled_dot_product_attention, whose memory is linear in T; what continues a
state goes through :func:`~refine.models.prefix_attention.prefix_attention`, which reads the prefix in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from refine.models.attention_state import MAX_OWN_TOKENS, AttentionState, AttentionTrace
from refine.models.blocks import RMSNorm, ZeroCentredRMSNorm
from refine.models.layout import PLAIN, BatchLayout
from refine.models.prefix_attention import prefix_attention

_FACTORS = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_TYPES = {  # whose frequencies do not depend on the length; what rope_parameters has to give
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "original_max_position_embeddings"),
    "llama3": ("rope_theta", "original_max_position_embeddings", *_FACTORS),
}


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) on the first ``size`` of each head, half rotation.

    Frequencies, angles, sines and cosines are in float32 whatever the model's dtype.
    """

    size: int
    config: object  # names theta, and the scaling of the frequencies where there is one

    def __post_init__(self):
        given = self.config.rope_parameters or {}
        kind = given.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(f"rope_type {kind!r} is not implemented, only {', '.join(ROPE_TYPES)} are")
        if missing := [name for name in ROPE_TYPES[kind] if given.get(name) is None]:
            raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} in rope_parameters, got {given}")

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
        rotary: the encoding of positions; None: there is none.
        gated: ``q_proj`` gives a gate beside each head's query; the output is multiplied by its sigmoid.
    """

    takes_cu_seqlens: ClassVar[bool] = True

    def __init__(self, config, rotary: Rotary | None, gated: bool):
        super().__init__()
        hidden, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.gated, self.rotary = head_dim(config), gated, rotary
        if heads % groups:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads: got {heads} and {groups}"
            )
        bias = config.attention_bias
        self.q_proj = nn.Linear(hidden, heads * self.head_dim * (2 if gated else 1), bias=bias)
        self.k_proj = nn.Linear(hidden, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, hidden]
        state: AttentionState | None = None,
        layout: BatchLayout = PLAIN,
        use_cache: bool = False,
        state_stride: int | None = None,  # a trace is wanted; it costs nothing whatever the number
    ) -> tuple[torch.Tensor, AttentionState | None, AttentionTrace | None]:
        read = layout.tokens_read(x)  # [N]
        start = torch.zeros_like(read) if state is None else state.position().expand(len(read))
        q, k, v, gate = self._project(x, layout.positions(x, start))
        if state is None:
            o = _causal_attention(q, k, v, layout)
        if layout.packed:
            q, k, v = (layout.to_rows(z, dim=2) for z in (q, k, v))
        after = AttentionState((k,), (v,)) if state is None else state.with_own(k, v)
        if state is not None:
            o = prefix_attention(
                q, state.keys, state.values, state.rows, state.read, after.own_k, after.own_v
            )
            o = layout.to_packed(o, dim=2) if layout.packed else o
        trace = None
        if state_stride is not None:
            whole = after.settle()
            trace = AttentionTrace(whole.keys, whole.values, start)
        if not use_cache:
            after = None
        elif not layout.plain:
            after = after.settle(start + read)
        elif after.own_tokens > MAX_OWN_TOKENS:
            after = after.settle()
        return self._merge(o, gate), after, trace

    def _project(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Queries [B, H, T, d], keys and values [B, G, T, d], the gate [B, T, H d] or None."""
        gate = None
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim * (2 if self.gated else 1)))
        if self.gated:
            q, gate = q.chunk(2, dim=-1)
            gate = gate.flatten(-2)
        k, v = (z.unflatten(-1, (-1, self.head_dim)) for z in (self.k_proj(x), self.v_proj(x)))
        q, k, v = (z.transpose(1, 2) for z in (*self._norm_heads(q, k), v))
        if self.rotary is not None:
            angles = self.rotary.angles(positions)
            q, k = self.rotary.rotate(q, angles), self.rotary.rotate(k, angles)
        return q, k.contiguous(), v.contiguous(), gate

    def _norm_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B, T, H, d] and keys [B, T, G, d], normed as the family does."""
        raise NotImplementedError

    def _merge(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        o = o.transpose(1, 2).flatten(2)
        return self.o_proj(o if gate is None else o * gate.sigmoid())


def _causal_attention(
    q: torch.Tensor,  # [B, H, T, d]
    k: torch.Tensor,  # [B, G, T, d]
    v: torch.Tensor,  # [B, G, T, d]
    layout: BatchLayout,
) -> torch.Tensor:  # [B, H, T, d]
    """Whole sequences; padding on the right is seen by nothing that counts."""
    if layout.packed:
        lengths = layout.document_lengths.tolist()
        documents = zip(*(z.split(lengths, dim=2) for z in (q, k, v)))
        return torch.cat([_causal_attention(*document, PLAIN) for document in documents], dim=2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def head_dim(config) -> int:
    """Size of one head: as given, else hidden_size / num_attention_heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class QwenAttention(FullAttention):
    """Zero-centred norms over each head, rotary positions on a part of it, an output gate."""

    def __init__(self, config):
        size = int(head_dim(config) * (config.rope_parameters or {}).get("partial_rotary_factor", 1.0))
        if size % 2:
            raise ValueError(
                f"head_dim * partial_rotary_factor must be even, as positions are rotated in pairs, got {size} "
                f"for head_dim={head_dim(config)}"
            )
        super().__init__(config, Rotary(size, config), gated=True)
        self.q_norm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = ZeroCentredRMSNorm(self.head_dim, config.rms_norm_eps)

    def _norm_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q_norm(q), self.k_norm(k)


class OlmoHybridAttention(FullAttention):
    """Norms over all heads together; rotary positions where the configuration has a ``rope_theta``, else none."""

    def __init__(self, config):
        positions = (
            config.rope_parameters is not None and config.rope_parameters.get("rope_theta") is not None
        )
        super().__init__(config, Rotary(head_dim(config), config) if positions else None, gated=False)
        self.q_norm = RMSNorm(self.q_proj.out_features, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.k_proj.out_features, config.rms_norm_eps)

    def _norm_heads(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.q_norm(q.flatten(-2)), self.k_norm(k.flatten(-2))
        return q.unflatten(-1, (-1, self.head_dim)), k.unflatten(-1, (-1, self.head_dim))
