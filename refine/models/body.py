"""The body that all fast-weight language models share: embeddings, blocks, final norm.

It knows nothing of any token mixer. A model class names its ``mixers``, one class a layer type; a mixer is made
from the configuration and its ``forward(x, state, layout, use_cache, state_stride)`` returns the output [B, T,
hidden], the new state (None without ``use_cache``) and the trace (None without ``state_stride``), both of its own
kind (see :mod:`refine.models.state`). ``x`` [B, T, hidden] begins with the first token of every row;
``layout`` (:class:`~refine.models.layout.BatchLayout`) says how much of a row is read, or where its documents
begin. A mixer that reads packed rows right says so by ``takes_cu_seqlens = True``; no other is given any.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from refine.models.blocks import GatedMLP, RMSNorm, is_loaded
from refine.models.config import FastWeightConfig
from refine.models.layout import BatchLayout, Packing, place
from refine.models.names import refuse_unknown
from refine.models.output import CACHE_NAME, FastWeightOutput
from refine.models.state import FastWeightState, StateTrace, check_state, position_before, state_after

_drawn_outside: ContextVar[bool] = ContextVar("_drawn_outside", default=False)


@contextlib.contextmanager
def weights_drawn_outside() -> Iterator[None]:
    """Bodies made in here leave their weights to be drawn by the model that they become a part of."""
    token = _drawn_outside.set(True)
    try:
        yield
    finally:
        _drawn_outside.reset(token)


class FastWeightPreTrainedModel(PreTrainedModel):
    """What a body and a model with a head have in common: how weights are initialised, saved and split.

    A module of another kind than those below that has parameters of its own draws them in a method
    ``reset_own_parameters()``, except those that have been loaded (:func:`~refine.models.blocks.is_loaded`).
    """

    config_class = FastWeightConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            if not is_loaded(module.weight):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            bias = getattr(module, "bias", None)
            if bias is not None and not is_loaded(bias):
                nn.init.zeros_(bias)
        elif hasattr(module, "reset_own_parameters"):
            module.reset_own_parameters()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() goes on from the state that forward() returns


class Block(GradientCheckpointingLayer):
    """``h += attention(norm(h))``, then ``h += mlp(norm(h))``."""

    def __init__(self, config: FastWeightConfig, mixer: nn.Module, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = mixer
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.mlp_size)

    # not named use_cache and past_key_values: transformers turns those off under gradient checkpointing, where a
    # state that is never written in place is as good as without
    def forward(self, hidden, state, layout: BatchLayout, keep_state=False, state_stride=None):
        mixed, new_state, trace = self.attn(self.attn_norm(hidden), state, layout, keep_state, state_stride)
        hidden = hidden + mixed
        return hidden + self.mlp(self.mlp_norm(hidden)), new_state, trace


class FastWeightModel(FastWeightPreTrainedModel):
    """Embeddings, blocks, final norm: token ids in, hidden states out.

    Attributes:
        mixers: layer type -> class of the token mixer, for the types in ``config.mixer_types``.
        block_class: a layer, made as ``block_class(config, mixer, layer_index)``.
        norm_class: the norm before the head, made as ``norm_class(hidden_size, norm_eps)``.
        embeddings_name: the embeddings' name in checkpoints.
    """

    mixers: ClassVar[dict[str, type[nn.Module]]] = {}
    block_class: ClassVar[type[nn.Module]] = Block
    norm_class: ClassVar[type[nn.Module]] = RMSNorm
    embeddings_name: ClassVar[str] = "embeddings"

    def __init__(self, config: FastWeightConfig):
        super().__init__(config)
        self.set_input_embeddings(nn.Embedding(config.vocab_size, config.hidden_size))
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(self.block_class(config, self.make_mixer(config, i), i) for i in layers)
        self.norm = self.norm_class(config.hidden_size, config.norm_eps)
        self.post_init()

    def make_mixer(self, config: FastWeightConfig, layer: int) -> nn.Module:
        """The token mixer of one layer, by its type.

        Raises:
            ValueError: the configuration names a type that this model has no mixer for.
        """
        kind = config.mixer_types[layer]
        if kind not in self.mixers:
            allowed = ", ".join(sorted(self.mixers))
            raise ValueError(
                f"{config.model_type}: layer_types[{layer}] must be one of {allowed}, got {kind!r}"
            )
        return self.mixers[kind](config)

    def _check_packed(self) -> None:
        """Whether every layer's mixer says that it reads packed documents."""
        kinds = (self.mixers[kind] for kind in self.config.mixer_types)
        missing = sorted({kind.__name__ for kind in kinds if not getattr(kind, "takes_cu_seqlens", False)})
        if missing:
            raise ValueError(f"{', '.join(missing)} does not say takes_cu_seqlens: give one document a row")

    def init_weights(self) -> None:
        """Draw the weights, unless a model around this one draws all at once."""
        if not _drawn_outside.get():
            super().init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return getattr(self, self.embeddings_name)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        setattr(self, self.embeddings_name, value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, T]
        attention_mask: torch.Tensor | None = None,  # [B, >= T]
        position_ids: torch.Tensor | None = None,  # [B, T]
        past_key_values: FastWeightState | None = None,
        inputs_embeds: torch.Tensor | None = None,  # [B, T, hidden]
        use_cache: bool | None = None,
        *,
        cache: FastWeightState | None = None,
        cu_seqlens: torch.Tensor | None = None,  # [N + 1]
        cu_seq_lens_q: torch.Tensor | None = None,  # [N + 1]
        cu_seq_lens_k: torch.Tensor | None = None,  # [N + 1]
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,  # [B, T]
        state_stride: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown,
    ) -> FastWeightOutput | tuple:
        """Read tokens; return the hidden states after the final norm.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, >= T], 1 for a token, 0 for padding; the last T columns count. The tokens of a row
                are one run of ones; padding on either side of it never reaches a fast weight, a convolution or a
                position.
            position_ids: [B, T]: counts from 0, or goes on from ``past_key_values``; where it begins anew at 0, a
                new document begins.
            past_key_values: a state to go on from (the rows of ``input_ids`` are its continuations); ``cache`` is
                the same.
            inputs_embeds: [B, T, hidden] in place of ``input_ids``.
            use_cache: return the state after the last token. Default: the config's, except while training.
            cu_seqlens: [N + 1] integers from 0 to T, B = 1: the row is N documents, each of which begins anew: the
                state returned, the state given and the rows of the trace are those of the N documents.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: the same, by flash-attn's names.
            seq_idx: [B, T] the same, as the number of each token's document.
            state_stride: also return a trace, with states kept every so many tokens (a multiple of 64).
            output_hidden_states: also return the embeddings and every layer's output; the last is normed.
            return_dict: False for a tuple of what was asked for.

        Raises:
            TypeError: an unknown keyword, or a cache of another kind.
            ValueError: an argument does not fit; the message names it.
        """
        if unknown:
            refuse_unknown(
                f"{type(self).__name__}.forward", unknown, inspect.signature(self.forward).parameters
            )
        if output_attentions:
            raise ValueError("output_attentions must be False: a fast-weight layer has no attention weights")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        state = _read_state(past_key_values, cache)
        _check_stride(state_stride)
        batch, tokens = _check_tokens(input_ids, inputs_embeds)
        packing = Packing(
            position_ids, cu_seqlens, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx
        )
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        position = None if state is None else state.position
        placed = place((batch, tokens), attention_mask, packing, position, embeds.device)
        if placed.layout.packed:
            self._check_packed()
        rows = placed.take_in(embeds)
        check_state(state, len(self.layers), rows, placed.layout)

        keep_state = use_cache if use_cache is not None else (self.config.use_cache and not self.training)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, every, states, traces = rows, [], [], []
        for i, layer in enumerate(self.layers):
            every.append(hidden if wanted else None)
            before = None if state is None else state.layers[i]
            hidden, new_state, trace = layer(hidden, before, placed.layout, keep_state, state_stride)
            states.append(new_state)
            traces.append(trace)
        hidden = placed.put_back(self.norm(hidden), batch, tokens)

        output = FastWeightOutput(last_hidden_state=hidden, document_ends=placed.ends)
        if keep_state:
            output[CACHE_NAME] = state_after(state, states, rows, placed.layout)
        if state_stride is not None:
            output.trace = StateTrace(traces, position_before(state, rows, placed.layout))
        if wanted:
            output.hidden_states = (*(placed.put_back(x, batch, tokens) for x in every), hidden)
        keep_names = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if keep_names is not False else output.to_tuple()


def _read_state(past_key_values, cache) -> FastWeightState | None:
    """The state to go on from, by either name; None where it has read nothing."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("give past_key_values or cache, not both")
    state = cache if past_key_values is None else past_key_values
    if state is None or (isinstance(state, FastWeightState) and not state.started):
        return None
    if isinstance(state, FastWeightState):
        return state
    if isinstance(state, Cache) and state.get_seq_length() == 0:
        return None
    raise TypeError(
        f"past_key_values must be a FastWeightState, as this model returns it, got a {type(state).__name__}"
    )


def _check_tokens(input_ids, inputs_embeds) -> tuple[int, int]:
    """(B, T) of what is to be read."""
    name, x = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    form = "[batch, tokens]" if inputs_embeds is None else "[batch, tokens, hidden]"
    if x.dim() != len(form.split()) or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"{name} must be {form} with at least one of each, got {list(x.shape)}")
    return x.shape[0], x.shape[1]


def _check_stride(state_stride) -> None:
    whole = isinstance(state_stride, int) and not isinstance(state_stride, bool)
    if state_stride is not None and (not whole or state_stride < 64 or state_stride % 64):
        raise ValueError(f"state_stride must be a positive multiple of 64, got {state_stride!r}")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep the inputs of each layer alone for the backward, which runs the layer again."""
    # transformers 5.24 has it by another name and warns of the old one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
