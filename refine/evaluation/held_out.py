"""Next-token loss and accuracy, and the rewards of rollouts, on text that the model was not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from refine.method import RefineConfig, next_token_targets, refine_step
from refine.models.head import SampleToken
from refine_kernels.linear_logprob import mix_seeds


@torch.no_grad()
def evaluate_held_out(model, batches: Iterable, config: RefineConfig, seed: int = 0) -> dict[str, float]:
    """Measure a model on right-padded batches.

    Rollouts have ``config.rollout_length`` tokens at uniform positions, and every draw follows from ``seed`` and
    the sequence alone, so two models are compared at the same places of the same text.

    Returns:
        ``eval_loss`` (nats per token) and ``eval_accuracy`` over all valid targets; ``eval_cosine`` and
        ``eval_exact_match``, means over rollouts; ``eval_tokens`` and ``eval_sequences``, how many there were.
    """
    config = dataclasses.replace(
        config, selection="uniform", step="shared_prefix", rollout_stop_entropy=None, beta=0.0
    )
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums = dict.fromkeys(("loss", "right", "tokens", "cosine", "exact", "rollouts", "sequences"), 0.0)
    for batch in batches:
        input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
        targets, _ = next_token_targets(input_ids, mask.sum(1))
        output = model(input_ids, use_cache=False, head=SampleToken(temperature=0.0, targets=targets))
        valid = targets != -100
        sums["loss"] -= output.logprob[valid].double().sum().item()
        sums["right"] += (output.token == targets)[valid].sum().item()
        sums["tokens"] += valid.sum().item()
        seeds = mix_seeds(seed, batch.keys.to(device))
        step = refine_step(model, input_ids, config, attention_mask=mask, seeds=seeds)
        sums["cosine"] += step.cosine.sum().item()
        sums["exact"] += step.exact_match.sum().item()
        sums["rollouts"] += step.cosine.numel()
        sums["sequences"] += len(input_ids)
    model.train(was_training)
    if not sums["sequences"]:
        raise ValueError("there is no held-out text to evaluate on")
    return {
        "eval_loss": sums["loss"] / sums["tokens"],
        "eval_accuracy": sums["right"] / sums["tokens"],
        "eval_cosine": sums["cosine"] / sums["rollouts"],
        "eval_exact_match": sums["exact"] / sums["rollouts"],
        "eval_tokens": int(sums["tokens"]),
        "eval_sequences": int(sums["sequences"]),
    }


def held_out_by_document(
    model, batches: Iterable, config: RefineConfig, seed: int = 0
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """The numbers of :func:`evaluate_held_out` over batches of one document each, and their 95 % intervals; beside
    them ``eval_cosine_by_sequence``, a list of each document's, by which two evaluations are compared in pairs.

    Documents differ far more than the tokens of one, so the intervals are percentiles of 2,000 resamplings of
    documents (bootstrap). With a single document there are none.
    """
    found = [evaluate_held_out(model, [batch], config, seed) for batch in batches]
    if not found:
        raise ValueError("there is no held-out text to evaluate on")
    tokens = np.array([one["eval_tokens"] for one in found], dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(found), size=(2000, len(found)))
    result, intervals = {}, {}
    for name, weight in (
        ("eval_loss", tokens),
        ("eval_accuracy", tokens),
        ("eval_cosine", np.ones_like(tokens)),
        ("eval_exact_match", np.ones_like(tokens)),
    ):
        values = np.array([one[name] for one in found])
        result[name] = float(np.average(values, weights=weight))
        if len(found) > 1:
            means = (values * weight)[drawn].sum(1) / weight[drawn].sum(1)
            intervals[name] = tuple(np.percentile(means, [2.5, 97.5]).tolist())
    counts = {"eval_tokens": int(tokens.sum()), "eval_sequences": len(found)}
    return result | counts | {"eval_cosine_by_sequence": [one["eval_cosine"] for one in found]}, intervals
