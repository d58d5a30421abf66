"""One optimizer update: of a training step, of the answers of a post-training step, of test-time training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from refine.training.parallel import World, accumulating, clip_gradients

# Computes one micro-batch's share of the loss, and what to report of it: "loss", and any others.
Loss = Callable[[], tuple[torch.Tensor, dict[str, Any]]]


def adamw(model: torch.nn.Module, settings: Any) -> torch.optim.AdamW:
    """AdamW as ``OptimizerSettings`` say. Frozen parameters are left out."""
    of_vectors = settings.weight_decay if settings.decay_vectors else 0.0
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": of_vectors},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
    )


def apply_update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[Loss],
    *,
    max_grad_norm: float,
    bf16: bool = False,
    world: World = World(),  # noqa: B008
) -> dict[str, float]:
    """Update the parameters by the gradient of the sum of the losses, unless it or they are not finite.

    Each loss is computed and differentiated in turn, so that memory is that of one.

    Args:
        model: bare or wrapped.
        optimizer: of its parameters.
        losses: one function a micro-batch.
        max_grad_norm: gradients are clipped to this norm.
        bf16: autocast to bfloat16.
        world: the processes that take the update together.

    Returns:
        What the losses report, summed over them and averaged over processes; ``grad_norm`` before clipping;
        ``skipped``, 1 when the update was left out.
    """
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Any] = {}
    with torch.enable_grad():
        for number, compute in enumerate(losses, 1):
            with accumulating(model, last=number == len(losses)):
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss, found = compute()
                loss.backward()
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value
    if world.context is not None:
        world.context.sum_gradients(model)
    metrics = world.mean({name: float(value) for name, value in sums.items()})
    metrics["grad_norm"] = clip_gradients(model, max_grad_norm)
    finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
    if finite:
        optimizer.step()
    return metrics | {"skipped": int(not finite)}
