"""Test-time training: a few steps on the prompts themselves, answers, and the weights back as they were.

What is restored is everything that training touches: parameters, buffers, the optimizer's state, gradients and
the mode, bit for bit, whatever happens in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from refine.method import RefineConfig, Sequences, next_token_loss, refine_step
from refine.training.default_text import stable_hash
from refine_kernels.linear_logprob import mix_seeds

KINDS = ("refine", "sft", "none")
RESTORES = ("sample", "batch", "never")


class PromptTrainer:
    """Adapts a model to the prompts that it is about to answer.

    Args:
        model: one of this project's models.
        config: of the REFINE step; the paper's values are ``reward="binary"``, ``lambda_rl=0.4``.
        kind: ``refine``, or ``sft`` for the next-token loss alone.
        steps: updates on each batch of prompts.
        learning_rate, betas, eps, weight_decay: of AdamW; vectors (norms, decay rates) are not decayed.
        max_grad_norm: gradients are clipped to this norm.
        bf16: autocast to bfloat16; parameters stay as they are.
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
        learning_rate: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float = 0.2,
        bf16: bool = False,
        seed: int = 0,
    ):
        if kind not in KINDS[:2]:
            raise ValueError(f"kind must be refine or sft, got {kind!r}")
        self.model, self.config = model, config
        self.kind, self.steps, self.seed = kind, steps, seed
        self.max_grad_norm, self.bf16 = max_grad_norm, bf16
        groups = [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)
        self.skipped = 0

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
        self.optimizer.zero_grad(set_to_none=True)
        finite = True
        with torch.enable_grad():
            for prompt, key in chosen:
                loss = self._loss(prompt, key, step) / len(chosen)
                loss.backward()
                finite = finite and math.isfinite(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if finite and math.isfinite(norm.item()):
            self.optimizer.step()
        else:
            self.skipped += 1

    def _loss(self, prompt: np.ndarray, key: str, step: int) -> torch.Tensor:
        device = next(self.model.parameters()).device
        input_ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)  # [1, P]
        precision = torch.autocast(device.type, torch.bfloat16) if self.bf16 else nullcontext()
        with precision:
            if self.kind == "refine":
                number = torch.tensor([stable_hash(key) - 2**63], device=device)
                seeds = mix_seeds(self.seed, step, number)
                return refine_step(self.model, input_ids, self.config, seeds=seeds).loss
            return next_token_loss(self.model, Sequences.of(input_ids).labelled(), self.config.segment_length)


class Snapshot:
    """A model and its optimizer as they are now, to be had back bit for bit."""

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
        return [*self._model.parameters(), *self._model.buffers()]


def _cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
