"""Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464): the delta rule with a decay of the state.

``S_t = a_t S_{t-1} + k_t (beta_t (v_t - a_t S_{t-1}^T k_t))^T`` with
``log a_t = -exp(A_log) * softplus(W_a x_t + dt_bias)``. Everything else is DeltaNet.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from refine.models.blocks import draw_decay_, is_loaded
from refine.models.body import FastWeightModel
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.config import FastWeightConfig, check_numbers, check_sizes
from refine.models.delta_net import DeltaNetAttention
from refine.models.registry import register_model


class GatedDeltaNetConfig(FastWeightConfig):
    """Configuration of a Gated DeltaNet; the keys are those of published ``config.json`` files."""

    model_type = "gated_deltanet"
    only_implemented = FastWeightConfig.only_implemented | {"output_gate_activation": ("swish", "silu")}

    def __init__(
        self,
        hidden_size: int = 2048,
        num_hidden_layers: int = 21,
        num_heads: int = 6,
        head_dim: int = 256,
        expand_v: float = 2.0,
        conv_size: int = 4,
        use_gate: bool = True,
        allow_neg_eigval: bool = False,
        num_v_heads: int | None = None,
        **kwargs,
    ):
        check_sizes(self.model_type, num_heads=num_heads, head_dim=head_dim, conv_size=conv_size)
        check_numbers(self.model_type, expand_v=expand_v)
        if num_v_heads not in (None, num_heads):
            raise ValueError(f"num_v_heads must equal num_heads ({num_heads}) or be null, got {num_v_heads}")
        if head_dim * expand_v != int(head_dim * expand_v):
            raise ValueError(f"head_dim * expand_v must be whole, got {head_dim} * {expand_v}")
        self.num_heads = num_heads
        self.num_v_heads = num_v_heads
        self.head_dim = head_dim
        self.expand_v = expand_v
        self.conv_size = conv_size
        self.use_gate = use_gate
        self.allow_neg_eigval = allow_neg_eigval
        super().__init__(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, **kwargs)

    @property
    def head_k_dim(self) -> int:
        """Key size of one head, K."""
        return self.head_dim

    @property
    def head_v_dim(self) -> int:
        """Value size of one head, V."""
        return int(self.head_dim * self.expand_v)


class GatedDeltaNetAttention(DeltaNetAttention):
    """DeltaNet's token mixer with a learned decay a head."""

    def __init__(self, config):
        super().__init__(config)
        self.a_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.reset_decay()

    def reset_own_parameters(self) -> None:
        """Draw the decay, unless it has been loaded."""
        if not is_loaded(self.A_log):
            self.reset_decay()

    @torch.no_grad()
    def reset_decay(self, largest_rate: float = 16.0, steps: tuple[float, float] = (1e-3, 1e-1)) -> None:
        """Draw the decay anew, by default as Mamba-2 does: A uniform up to ``largest_rate``, softplus(dt_bias)
        log-uniform between ``steps``.
        """
        draw_decay_(self.A_log, self.dt_bias, (1e-3, largest_rate), steps)

    def log_decay(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, H] float32, at most 0."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        rate = F.softplus(self.a_proj(x).to(dtype) + self.dt_bias.to(dtype))
        return -self.A_log.to(dtype).exp() * rate


class GatedDeltaNetModel(FastWeightModel):
    """Gated DeltaNet without a head. See :class:`FastWeightModel` for what ``forward`` takes."""

    config_class = GatedDeltaNetConfig
    mixers: ClassVar = {"linear_attention": GatedDeltaNetAttention}


@register_model(
    "gated_delta_net",
    tiny={
        "hidden_size": 192,
        "num_hidden_layers": 4,
        "num_heads": 3,
        "head_dim": 64,
        "expand_v": 1.0,
        "intermediate_size": 512,
    },
)
class GatedDeltaNetForCausalLM(FastWeightForCausalLM):
    """Gated DeltaNet with a language-model head. See :class:`FastWeightForCausalLM`."""

    config_class = GatedDeltaNetConfig
    body_class = GatedDeltaNetModel
