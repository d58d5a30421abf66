"""A ``transformers.Trainer`` whose loss is a REFINE step.

Everything else is the Trainer's: data, optimizer, accumulation, mixed precision, DDP and FSDP, PEFT, checkpoints.
The settings of the method stand among the training arguments, by their own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from refine.method import RefineConfig, RefineStepOutput, refine_step
from refine.method.sequences import Sequences
from refine.training.samples import write_samples
from refine_kernels.linear_logprob import mix_seeds


@dataclass
class RefineTrainingArguments(TrainingArguments, RefineConfig):
    """``TrainingArguments``, and the settings of :class:`refine.RefineConfig`.

    Attributes:
        log_samples: at every logging step, write the rollouts of a sequence beside their true continuation into
            ``output_dir/samples`` (where the trainer has a ``processing_class``).
    """

    log_samples: bool = True

    def __post_init__(self):
        TrainingArguments.__post_init__(self)
        RefineConfig.__post_init__(self)


class RefineTrainer(Trainer):
    """Trains on every token: next-token loss plus rewarded rollouts (see :func:`refine.refine_step`).

    A batch holds ``input_ids`` [B, T] and, where there is padding, ``attention_mask``; or packed documents in one
    row, with ``position_ids``, ``cu_seq_lens_q`` or ``cu_seqlens``. ``labels`` may be there, as collators make them
    (masking nothing that is trained on). ``keys`` [B] int64 may name the sequences: a sequence's rollouts depend
    on ``args.seed``, the optimizer step and its key (default: its tokens), not on the batch it is in.

    ``evaluate`` and ``predict`` are the Trainer's, on the next-token loss.
    """

    def __init__(self, model=None, args: RefineTrainingArguments | None = None, **kwargs):
        args = RefineTrainingArguments(output_dir="trainer_output") if args is None else args
        if not isinstance(args, RefineTrainingArguments):
            raise TypeError(f"args must be refine.RefineTrainingArguments, got {type(args).__name__}")
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = False  # a step's loss is a mean over sequences, accumulated as such
        self._measured: list[dict[str, torch.Tensor]] = []  # of the steps since the last logging
        self._last: tuple[Sequences, RefineStepOutput] | None = None

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs=False, num_items_in_batch=None):
        """The loss of a REFINE step; in evaluation the next-token loss."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        cu_seqlens = _document_bounds(inputs)
        sequences = Sequences.of(ids, mask, cu_seqlens)
        _check_labels(inputs, cu_seqlens, getattr(self.processing_class, "pad_token_id", None))
        seeds = mix_seeds(self.args.seed, self.state.global_step, inputs.get("keys", _keys(sequences)))
        output = refine_step(model, sequences, self.args, seeds=seeds)
        self._note(output, sequences, mask)
        return (output.loss, output) if return_outputs else output.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As the Trainer's; every token is a label where the batch has none."""
        if "labels" not in inputs:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
            inputs = {**inputs, "labels": inputs["input_ids"].masked_fill(mask == 0, -100)}
        inputs.pop("keys", None)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add what the steps since the last time have measured, as means over steps and processes."""
        if self._measured and "loss" in logs:
            for name in self._measured[0]:
                mean = torch.stack([step[name].float() for step in self._measured]).mean()
                logs[name] = self.accelerator.reduce(mean, "mean").item()
            self._measured = []
            if self.args.log_samples and self.processing_class is not None and self.is_world_process_zero():
                sequences, output = self._last
                folder = Path(self.args.output_dir) / "samples"
                folder.mkdir(parents=True, exist_ok=True)
                ids = sequences.padded().input_ids[0, : int(sequences.lengths[0])]
                left = 0 if sequences.left is None else int(sequences.left[0])
                write_samples(folder, self.state.global_step, ids, output, self.processing_class, left=left)
        super().log(logs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "keys" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "keys"]

    def _note(self, output: RefineStepOutput, sequences: Sequences, mask: torch.Tensor | None) -> None:
        values = {
            "ntp_loss": output.ntp_loss,
            "nsp_loss": output.nsp_loss,
            "reward": output.rewards.mean(),
            "reward_std": output.reward_std,
            "cosine": output.cosine.mean(),
            "exact_match": output.exact_match.mean(),
            "entropy": (output.entropy if mask is None else output.entropy[mask.bool()]).mean(),
            "clip_fraction": output.clip_fraction,
            "rollout_length": output.rollout_lengths.float().mean(),
        }
        self._measured.append({name: value.detach() for name, value in values.items()})
        self._last = sequences, output


def _document_bounds(inputs: dict[str, Any]) -> torch.Tensor | None:
    """[S + 1] where packed documents begin and end, by whichever name a collator gives; None: not packed."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if inputs.get(name) is not None:
            return inputs[name]
    positions = inputs.get("position_ids")
    if positions is None or not bool((positions[:, 1:] == 0).any()):
        return None
    if len(positions) != 1:
        raise ValueError(f"position_ids of packed documents must be [1, T], got {list(positions.shape)}")
    return torch.nn.functional.pad((positions[0] == 0).nonzero()[:, 0], (0, 1), value=positions.shape[1])


def _check_labels(inputs: dict[str, Any], cu_seqlens: torch.Tensor | None, pad_token_id: int | None) -> None:
    """Labels may leave out padding (collators know it by its token) and the first token of a document."""
    labels, ids = inputs.get("labels"), inputs["input_ids"]
    if labels is None:
        return
    wrong = inputs.get("attention_mask", torch.ones_like(ids)).bool() & (labels != ids)
    wrong &= (ids != pad_token_id) if pad_token_id is not None else True
    wrong[:, 0] = False
    if cu_seqlens is not None:
        wrong[0, cu_seqlens[:-1].long()] = False
    if bool(wrong.any()):
        raise ValueError(
            f"labels must be input_ids: {int(wrong.sum())} tokens are masked or changed, but a REFINE step trains "
            "on every token (cut prompts off, or use TRL for completions alone)"
        )


def _keys(sequences: Sequences) -> torch.Tensor:
    """[S] int64: a key of each sequence, from its tokens."""
    rows = sequences.padded()
    column = torch.arange(rows.input_ids.shape[1], device=rows.input_ids.device)
    return (mix_seeds(rows.input_ids, column) * (column < rows.lengths[:, None])).sum(1)
