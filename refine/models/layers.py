"""Fast-weight layers for models of your own: one ``nn.Module`` each, hidden states in, hidden states out.

They are the token mixers of this project's models, with the same kernels and the same care for padding and packed
documents::

    layer = GatedDeltaNet(hidden_size=512, num_heads=4, head_dim=128)
    y = layer(x)                                          # [B, T, 512]
    y = layer(x, attention_mask=mask)                     # padding on either side of a row reaches nothing
    y = layer(packed, cu_seqlens=[0, 300, 1000])          # [1, 1000, 512]: each document begins anew
    y, state = layer(x, return_state=True)                # and on, token by token:
    y, state = layer(next_x, state=state, return_state=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from refine.models.config import FastWeightConfig
from refine.models.delta_net import DeltaNetAttention, DeltaNetConfig
from refine.models.gated_delta_net import GatedDeltaNetAttention, GatedDeltaNetConfig
from refine.models.lact import LaCTAttention, LaCTConfig
from refine.models.layout import Packing, place
from refine.models.state import FastWeightState, check_state, state_after


class FastWeightLayer(nn.Module):
    """A token mixer with plain arguments; norm and residual around it are the caller's.

    Args:
        hidden_size: D, width of the input and the output.
        **settings: of the layer, as in the model's configuration (``config_class``).

    Raises:
        ValueError: a setting that the configuration does not take, with the nearest name, or that cannot be.
    """

    config_class: ClassVar[type[FastWeightConfig]]
    mixer_class: ClassVar[type[nn.Module]]

    def __init__(self, hidden_size: int, **settings):
        super().__init__()
        self.config_class.check_settings(settings, type(self).__name__)
        self.mixer = self.mixer_class(self.config_class(hidden_size=hidden_size, **settings))

    def forward(
        self,
        x: torch.Tensor,  # [B, T, D]
        attention_mask: torch.Tensor | None = None,  # [B, >= T]
        cu_seqlens: torch.Tensor | Sequence[int] | None = None,  # [N + 1]
        state: FastWeightState | None = None,
        return_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, FastWeightState]:
        """Mix tokens along their sequences.

        Args:
            x: [B, T, D] float32, bfloat16, float16 or float64, as the layer's weights are.
            attention_mask: [B, >= T], 1 for a token, 0 for padding on either side; the last T columns count.
            cu_seqlens: [N + 1] integers from 0 to T with B = 1: N documents in one row.
            state: go on from the state that an earlier call returned (of N sequences); it is not changed.
            return_state: also return the state after the last token.

        Returns:
            y [B, T, D], or (y, state).

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        if x.dim() != 3:
            raise ValueError(f"x must be [batch, tokens, hidden], got {list(x.shape)}")
        position = None if state is None else state.position
        placed = place(x.shape[:2], attention_mask, Packing(cu_seqlens=cu_seqlens), position, x.device)
        rows = placed.take_in(x)
        check_state(state, 1, rows, placed.layout)
        before = None if state is None else state.layers[0]
        y, after, _ = self.mixer(rows, before, placed.layout, return_state)
        y = placed.put_back(y, *x.shape[:2])
        return (y, state_after(state, [after], rows, placed.layout)) if return_state else y


class DeltaNet(FastWeightLayer):
    """DeltaNet (Yang et al., arXiv 2406.06484). Settings: ``num_heads``, ``expand_k``, ``expand_v``, ``conv_size``,
    ``use_gate``, ``allow_neg_eigval``, ``norm_eps``."""

    config_class = DeltaNetConfig
    mixer_class = DeltaNetAttention


class GatedDeltaNet(FastWeightLayer):
    """Gated DeltaNet (Yang, Kautz, Hatamizadeh, arXiv 2412.06464). Settings: ``num_heads``, ``head_dim``,
    ``expand_v``, ``conv_size``, ``use_gate``, ``allow_neg_eigval``, ``norm_eps``."""

    config_class = GatedDeltaNetConfig
    mixer_class = GatedDeltaNetAttention


class LaCT(FastWeightLayer):
    """LaCT (Zhang et al., arXiv 2505.23884): window attention and large-chunk fast weights. Settings:
    ``num_attn_heads``, ``num_lact_heads``, ``inter_multi``, ``lact_chunk_size``, ``window_size``, ``use_muon``,
    ``use_momentum``, ``w0_w2_low_rank``, ``rope_theta`` and the rest of :class:`~refine.models.LaCTConfig`."""

    config_class = LaCTConfig
    mixer_class = LaCTAttention
