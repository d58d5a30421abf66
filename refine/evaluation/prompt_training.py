"""Test-time training: a few steps on the prompts themselves, answers, and the weights back as they were.

What is restored is everything that training touches: trained parameters (with LoRA these are the adapters alone),
buffers, the optimizer's state, gradients and the mode, bit for bit, whatever happens in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from refine.data.document import stable_hash
from refine.evaluation.settings import KINDS
from refine.method import RefineConfig, RefineStepOutput, Sequences, next_token_loss, refine_step
from refine.method.rollouts import Rollouts
from refine.shared_settings import OptimizerSettings
from refine.training.update import adamw, apply_update
from refine_kernels.linear_logprob import mix_seeds


class PromptTrainer:
    """Adapts a model to the prompts that it is about to answer.

    Args:
        model: one of this project's models.
        config: of the REFINE step; the paper's values are ``reward="binary"``, ``lambda_rl=0.4``.
        kind: ``refine``, or ``sft`` for the next-token loss alone.
        steps: updates on each batch of prompts.
        optimizer: of AdamW, and the norm to which gradients are clipped.
        bf16: autocast to bfloat16; parameters stay as they are.
        mini_batches: updates that one draw of rollouts serves, each on its share of the prompts.
        seed: of the rollouts. A prompt's draws depend on it, on the step and on the prompt's key alone.

    Attributes:
        skipped: updates left out because a loss or gradient was not finite.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: RefineConfig,
        *,
        kind: str = "refine",
        steps: int = 1,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        bf16: bool = False,
        seed: int = 0,
        mini_batches: int = 1,
    ):
        if kind not in KINDS[:2]:
            raise ValueError(f"kind must be refine or sft, got {kind!r}")
        self.model, self.config = model, config
        self.kind, self.steps, self.seed = kind, steps, seed
        self.max_grad_norm, self.bf16 = optimizer.max_grad_norm, bf16
        self.optimizer = adamw(model, optimizer)
        self.mini_batches, self.skipped = mini_batches, 0

    @property
    def least_tokens(self) -> int:
        """The shortest prompt that can be trained on."""
        return self.config.min_tokens if self.kind == "refine" else 2

    @contextmanager
    def adapted(self, prompts: Sequence[np.ndarray], keys: Sequence[str]) -> Iterator[int]:
        """Train, give how many prompts were long enough for it, and put everything back at the end: after an
        exception and after Ctrl-C, too."""
        before = Snapshot(self.model, self.optimizer)
        try:
            yield self.train(prompts, keys)
        finally:
            try:
                before.restore()
            except KeyboardInterrupt:  # half-way; restoring can be done again
                before.restore()
                raise

    def train(self, prompts: Sequence[np.ndarray], keys: Sequence[str]) -> int:
        """``steps`` updates on these prompts ([P] token ids each), which stay.

        Each prompt goes through the model by itself, so that memory is that of one; the loss of a batch is the
        mean over its prompts. Prompts shorter than :attr:`least_tokens` are left out.

        Returns:
            How many prompts were trained on.
        """
        chosen = [(p, key) for p, key in zip(prompts, keys) if len(p) >= self.least_tokens]
        was_training = self.model.training
        self.model.train()
        try:
            for step in range(self.steps if chosen else 0):
                self._update(chosen, step)
        finally:
            self.model.train(was_training)
            self.optimizer.zero_grad(set_to_none=True)
        return len(chosen)

    def _update(self, chosen: list[tuple[np.ndarray, str]], step: int) -> None:
        """The updates of one step: off-policy where one draw serves several."""
        draws: list[Rollouts | None] = [None] * len(chosen)
        if self.kind == "refine" and self.mini_batches > 1:
            device = next(self.model.parameters()).device
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                draws = [self._refine(prompt, key, step).drawn for prompt, key in chosen]
        size = -(-len(chosen) // self.mini_batches)
        for first in range(0, len(chosen), size):
            share = slice(first, first + size)
            self._apply(list(zip(chosen[share], draws[share])), step)

    def _apply(self, share: list[tuple[tuple[np.ndarray, str], Rollouts | None]], step: int) -> None:
        def loss_of(
            prompt: np.ndarray, key: str, drawn: Rollouts | None
        ) -> tuple[torch.Tensor, dict[str, Any]]:
            loss = self._loss(prompt, key, step, drawn) / len(share)
            return loss, {"loss": loss.item()}

        losses = [lambda one=one, drawn=drawn: loss_of(*one, drawn) for one, drawn in share]
        metrics = apply_update(
            self.model, self.optimizer, losses, max_grad_norm=self.max_grad_norm, bf16=self.bf16
        )
        self.skipped += metrics["skipped"]

    def _refine(
        self, prompt: np.ndarray, key: str, step: int, drawn: Rollouts | None = None
    ) -> RefineStepOutput:
        input_ids = self._ids(prompt)
        keys = torch.tensor([stable_hash(key) - 2**63], device=input_ids.device)
        seeds = mix_seeds(self.seed, step, keys)
        return refine_step(self.model, input_ids, self.config, seeds=seeds, rollouts=drawn)

    def _ids(self, prompt: np.ndarray) -> torch.Tensor:
        """[1, P] int64 on the model's device."""
        return torch.from_numpy(prompt.astype(np.int64))[None].to(next(self.model.parameters()).device)

    def _loss(self, prompt: np.ndarray, key: str, step: int, drawn: Rollouts | None) -> torch.Tensor:
        if self.kind == "refine":
            return self._refine(prompt, key, step, drawn).loss
        input_ids = self._ids(prompt)
        return next_token_loss(self.model, Sequences.of(input_ids), self.config.segment_length)


class Snapshot:
    """A model and its optimizer as they are now, restored bit for bit."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self._model, self._optimizer = model, optimizer
        self._training = model.training
        self._tensors = [x.detach().clone() for x in self._live()]
        self._state = {p: _cloned(state) for p, state in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was; gradients are gone."""
        for live, saved in zip(self._live(), self._tensors):
            live.copy_(saved)
        self._optimizer.state.clear()
        for parameter, state in self._state.items():
            self._optimizer.state[parameter] = _cloned(state)
        self._optimizer.zero_grad(set_to_none=True)
        self._model.zero_grad(set_to_none=True)
        self._model.train(self._training)

    def _live(self) -> list[torch.Tensor]:
        trained = [p for p in self._model.parameters() if p.requires_grad]
        return [*trained, *self._model.buffers()]


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
