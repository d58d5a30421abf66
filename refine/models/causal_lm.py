"""The shell that all fast-weight language models share: configuration, block, body, head, generation.

It knows nothing of any token mixer: a model names its ``attention_class``, whose ``forward(x, state, lengths,
use_cache, state_stride)`` returns the output, the new state and the trace of its own kind (see
:mod:`refine.models.state`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from refine.models.blocks import GatedMLP, RMSNorm, ShortConvolution
from refine.models.head import HeadRequest
from refine.models.state import FastWeightState, StateTrace
from refine_kernels import linear_cross_entropy


class FastWeightConfig(PretrainedConfig):
    """What every fast-weight model is configured by.

    ``config.json`` files of published checkpoints carry keys of many versions. Keys that only choose a
    peer's kernel are kept and ignored; keys that change the mathematics are read, and a value that is not
    implemented is refused by name.
    """

    keys_to_ignore_at_inference = ("past_key_values",)
    # key -> the values that this project implements; anything else would load and silently be another model
    only_implemented: ClassVar[dict[str, tuple]] = {
        "hidden_act": ("swish", "silu"),
        "use_short_conv": (True,),
        "conv_bias": (False,),
        "attn": (None,),
        "attnres_block_size": (None,),
    }

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 2048,
        num_hidden_layers: int = 24,
        intermediate_size: int | None = None,
        hidden_ratio: int | None = 4,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        max_position_embeddings: int = 2048,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        for key, implemented in self.only_implemented.items():
            if key in kwargs and kwargs[key] not in implemented:
                allowed = " or ".join(repr(value) for value in implemented)
                raise ValueError(
                    f"{self.model_type} config: {key}={kwargs[key]!r} is not implemented, only {allowed} is"
                )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_ratio = hidden_ratio
        self.intermediate_size = intermediate_size
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @property
    def mlp_size(self) -> int:
        """Width of the gated MLP: as given, else 2/3 of ``hidden_ratio * hidden_size`` rounded up to 256."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
        return 256 * -(-width // 256)


@dataclass
class FastWeightOutput(ModelOutput):
    """What a forward pass returns; fields that were not asked for are None.

    Attributes:
        loss: scalar float32, from ``labels`` or a :class:`~refine.models.head.NextTokenLoss` request.
        logits: [B, T, V], only when neither ``labels`` nor ``head`` is given.
        past_key_values: the state after the last token, with ``use_cache``.
        last_hidden_state: [B, T, hidden], after the final norm, before the head.
        entropy, logprob: [B, T] float32; token: [B, T] int64; as the head request says.
        trace: with ``state_stride``, gives the state at any position.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: FastWeightState | None = None
    last_hidden_state: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    logprob: torch.Tensor | None = None
    token: torch.Tensor | None = None
    trace: StateTrace | None = None


class Block(GradientCheckpointingLayer):
    """``h += attention(norm(h))``, then ``h += mlp(norm(h))``."""

    def __init__(self, config: FastWeightConfig, attention_class: type[nn.Module]):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = attention_class(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_size)

    def forward(self, hidden, state=None, lengths=None, keep_state=False, state_stride=None):
        mixed, new_state, trace = self.attn(self.attn_norm(hidden), state, lengths, keep_state, state_stride)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), new_state, trace


class FastWeightModel(nn.Module):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: FastWeightConfig, attention_class: type[nn.Module]):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, attention_class) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, inputs_embeds, state=None, lengths=None, keep_state=False, state_stride=None):
        hidden, states, traces = inputs_embeds, [], []
        for i, layer in enumerate(self.layers):
            layer_state = None if state is None else state.layers[i]
            hidden, new_state, trace = layer(hidden, layer_state, lengths, keep_state, state_stride)
            states.append(new_state)
            traces.append(trace)
        return self.norm(hidden), states, traces


class FastWeightForCausalLM(PreTrainedModel, GenerationMixin):
    """A fast-weight language model: save, load, generate, continue from a state, branch from a trace."""

    config_class = FastWeightConfig
    attention_class: type[nn.Module]
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: FastWeightConfig):
        super().__init__(config)
        self.model = FastWeightModel(config, self.attention_class)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                nn.init.zeros_(bias)
        elif isinstance(module, ShortConvolution):
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, RMSNorm):
            if not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.ones_(module.weight)
        elif hasattr(module, "reset_fast_weights"):
            module.reset_fast_weights()
        elif hasattr(module, "reset_decay") and not getattr(module.A_log, "_is_hf_initialized", False):
            module.reset_decay()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.embeddings = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: FastWeightState | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        *,
        hidden_states: torch.Tensor | None = None,
        head: HeadRequest | None = None,
        state_stride: int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FastWeightOutput:
        """Read tokens; return logits, or whatever else is asked for.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, >= T], 1 for a token, 0 for padding; the last T columns count. Padding on the
                right is not read. Padding on the left is taken off, so it never reaches a fast weight, a
                convolution or a position.
            past_key_values: a state to go on from (the rows of ``input_ids`` are its continuations).
            inputs_embeds: [B, T, hidden] in place of ``input_ids``.
            labels: [B, T], shifted inside, -100 ignored: ``loss`` is returned and no logits.
            use_cache: return the state after the last token. Default: the config's, except while training.
            logits_to_keep: only the last so many positions' logits; 0 means all.
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            hidden_states: [B, T, hidden] final hidden states: skip the body, use only the head on them.
            head: what to compute in place of logits, see :mod:`refine.models.head`.
            state_stride: also return a trace, with states kept every so many tokens (a multiple of 64).

        Raises:
            ValueError: a mask with holes, or not exactly one kind of input.
        """
        given = [x is not None for x in (input_ids, inputs_embeds, hidden_states)]
        if sum(given) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and hidden_states")
        if hidden_states is not None:
            return self._use_head(hidden_states, head, labels, logits_to_keep, num_items_in_batch)

        embeds = self.model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        lengths, shift = _read_mask(attention_mask, embeds.shape[1])
        if shift is not None:
            embeds = _roll_rows(embeds, shift)
        keep_state = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        hidden, states, traces = self.model(embeds, past_key_values, lengths, keep_state, state_stride)
        if shift is not None:
            hidden = _roll_rows(hidden, -shift)

        output = self._use_head(hidden, head, labels, logits_to_keep, num_items_in_batch)
        batch, tokens = embeds.shape[:2]
        if past_key_values is None:
            start = torch.zeros(batch, dtype=torch.int64, device=embeds.device)
        else:
            start = past_key_values.position
        if keep_state:
            output.past_key_values = FastWeightState(states, start + (tokens if lengths is None else lengths))
        if state_stride is not None:
            output.trace = StateTrace(traces, start)
        return output

    def _use_head(self, hidden, head, labels, logits_to_keep, num_items_in_batch) -> FastWeightOutput:
        output = FastWeightOutput(last_hidden_state=hidden)
        if head is not None:
            for name, value in head(hidden, self.lm_head.weight).items():
                output[name] = value
        elif labels is not None:
            targets = labels.new_full(labels.shape, -100)
            targets[:, :-1] = labels[:, 1:]
            reduction = "mean" if num_items_in_batch is None else "sum"
            output.loss = linear_cross_entropy(hidden, self.lm_head.weight, targets, reduction=reduction)
            if num_items_in_batch is not None:
                output.loss = output.loss / num_items_in_batch
        else:
            output.logits = self.lm_head(hidden[:, -logits_to_keep:])
        return output

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() goes on from the state that forward() returns


def _read_mask(mask: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(tokens read a row [B] or None for all, shift that takes left padding off [B] or None)."""
    if mask is None:
        return None, None
    mask = mask[:, -tokens:].bool()
    if mask.all():
        return None, None
    lengths = mask.sum(1)
    column = torch.arange(tokens, device=mask.device)
    right_padded = column < lengths[:, None]
    if torch.equal(mask, right_padded):
        return lengths, None
    left = tokens - lengths  # [B]
    left_padded = column >= left[:, None]
    row_is_right = (mask == right_padded).all(1)
    row_is_left = (mask == left_padded).all(1)
    if not (row_is_right | row_is_left).all():
        row = int((~(row_is_right | row_is_left)).nonzero()[0])
        raise ValueError(f"attention_mask has a hole in row {row}: padding must be at one end of a row")
    return lengths, torch.where(row_is_right, 0, left)


def _roll_rows(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Row b moved ``shift[b]`` places to the left, around the end: [B, T, D], [B] -> [B, T, D]."""
    index = (torch.arange(x.shape[1], device=x.device) + shift[:, None]) % x.shape[1]
    return x.gather(1, index[..., None].expand_as(x))
