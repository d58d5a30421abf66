"""A body with a language-model head: logits, losses and log-probabilities, generation."""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from torch import nn
from transformers.generation import GenerationMixin

from refine.models.body import FastWeightModel, FastWeightPreTrainedModel, weights_drawn_outside
from refine.models.config import FastWeightConfig
from refine.models.head import HeadRequest
from refine.models.names import refuse_unknown
from refine.models.output import CACHE_NAME, FastWeightOutput
from refine.models.state import FastWeightState
from refine.models.wrapped import head_operands
from refine_kernels import linear_cross_entropy


class FastWeightForCausalLM(FastWeightPreTrainedModel, GenerationMixin):
    """A fast-weight language model: save, load, generate, continue from a state, branch from a trace.

    Attributes:
        body_class: what turns tokens into hidden states; ``model.model`` is one.
        skipped_weights: prefix of names -> what it is, for parts of checkpoints beside the language model, which
            are not loaded.
        left_in_checkpoint: (where it was loaded from, the parts that were not loaded), where there are any.
    """

    body_class: ClassVar[type[FastWeightModel]]
    skipped_weights: ClassVar[dict[str, str]] = {}
    left_in_checkpoint: tuple[str, str] | None = None
    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True  # a Trainer may hand over num_items_in_batch

    def __init__(self, config: FastWeightConfig):
        super().__init__(config)
        with weights_drawn_outside():
            self.model = self.body_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embeddings."""
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, T]
        attention_mask: torch.Tensor | None = None,  # [B, >= T]
        past_key_values: FastWeightState | None = None,
        inputs_embeds: torch.Tensor | None = None,  # [B, T, hidden]
        labels: torch.Tensor | None = None,  # [B, T]
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,  # [B, T]
        *,
        cache: FastWeightState | None = None,
        hidden_states: torch.Tensor | None = None,  # [B, T, hidden]
        head: HeadRequest | None = None,
        return_logits: bool | None = None,
        state_stride: int | None = None,
        cu_seqlens: torch.Tensor | None = None,  # [N + 1]
        cu_seq_lens_q: torch.Tensor | None = None,  # [N + 1]
        cu_seq_lens_k: torch.Tensor | None = None,  # [N + 1]
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,  # [B, T]
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **unknown,
    ) -> FastWeightOutput | tuple:
        """Read tokens; return logits, or whatever else is asked for.

        What is not described here is the body's: see :meth:`FastWeightModel.forward`.

        Args:
            labels: [B, T], shifted inside, -100 ignored: ``loss`` is returned, computed without logits. The first
                token of a packed document is no target of the document before it.
            logits_to_keep: only the logits of the last so many positions (0: all), or of these positions (a
                tensor).
            num_items_in_batch: divide the summed loss by this instead of the number of labels.
            hidden_states: [B, T, hidden] final hidden states: skip the body, use only the head on them.
            head: what to compute in place of logits, see :mod:`refine.models.head`.
            return_logits: with ``labels``, also return logits. Default: only outside of training
                (``model.eval()``).

        Raises:
            TypeError: an unknown keyword, or a cache of another kind.
            ValueError: an argument does not fit; the message names it.
        """
        if unknown:
            refuse_unknown(
                f"{type(self).__name__}.forward", unknown, inspect.signature(self.forward).parameters
            )
        given = [x is not None for x in (input_ids, inputs_embeds, hidden_states)]
        if sum(given) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds and hidden_states")
        if hidden_states is not None:
            read = FastWeightOutput(last_hidden_state=hidden_states)
        else:
            read = self.model(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cache=cache,
                cu_seqlens=cu_seqlens, cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k,
                max_length_q=max_length_q, max_length_k=max_length_k, seq_idx=seq_idx, state_stride=state_stride,
                output_hidden_states=output_hidden_states, output_attentions=output_attentions, return_dict=True,
            )  # fmt: skip
        hidden = read.last_hidden_state
        values = dict(read)
        if head is not None:
            used = getattr(head, "needs_weight", True)
            values |= head(*head_operands(self.lm_head, hidden)) if used else {}
        elif labels is not None:
            values["loss"] = self._loss(hidden, labels, values.pop("document_ends", None), num_items_in_batch)
        if head is None and (
            labels is None or (not self.training if return_logits is None else return_logits)
        ):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            values["logits"] = self.lm_head(hidden[:, kept])
        output = FastWeightOutput(**values)
        keep_names = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if keep_names is not False else output.to_tuple()

    def _loss(self, hidden, labels, document_ends, num_items_in_batch) -> torch.Tensor:
        """Cross-entropy of the next token, without logits."""
        if labels.shape != hidden.shape[:2]:
            raise ValueError(f"labels must be {list(hidden.shape[:2])}, got {list(labels.shape)}")
        targets = labels.new_full(labels.shape, -100)
        targets[:, :-1] = labels[:, 1:]
        if document_ends is not None:
            targets = targets.masked_fill(document_ends.to(targets.device), -100)
        operands = head_operands(self.lm_head, hidden)
        if num_items_in_batch is None:
            return linear_cross_entropy(*operands, targets.to(hidden.device))
        loss = linear_cross_entropy(*operands, targets.to(hidden.device), reduction="sum")
        return loss / num_items_in_batch

    def generate(self, inputs: torch.Tensor | None = None, generation_config=None, **kwargs):
        """As ``transformers`` does it, also from a state and with ``prefill_chunk_size``.

        A state that is passed on (``past_key_values=``, or ``cache=``) is not changed; with
        ``return_dict_in_generate=True`` the state after the last token read is in the result.
        """
        given = [kwargs.pop(name) for name in ("past_key_values", "cache") if kwargs.get(name) is not None]
        if len(given) == 2:
            raise ValueError("give past_key_values or cache, not both")
        chunked = kwargs.get("prefill_chunk_size", getattr(generation_config, "prefill_chunk_size", None))
        if given or chunked is not None:
            kwargs[CACHE_NAME] = given[0] if given else FastWeightState()
        return super().generate(inputs, generation_config, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """The arguments of the next call of ``forward``; see ``transformers``' own.

        Raises:
            ValueError: ``input_ids`` is shorter than what the state has read.
        """
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                "generate from past_key_values needs input_ids that begin with the tokens it has read and go on "
                "after them, or an attention_mask over both: got "
                f"{input_ids.shape[1]} tokens and a state of {input_ids.shape[1] - next_sequence_length}"
            )
        return super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
