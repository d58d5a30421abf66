"""What a run leaves of single documents: where rollouts began, what they were, and what they were rewarded for.

``samples/step-000020.txt`` is for reading; ``samples/step-000020.json`` (a document of the training data) and
``samples/held-out-000080.json`` (always the same held-out document) hold what ``refine report`` shows: each token
with its entropy, each rollout with its rewards. Of these there are at most :data:`KEPT` of a kind, and of a long
document only stretches of :data:`LONGEST` tokens in all, so that their size has a bound.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from refine.files import write_whole
from refine.method import RefineConfig, RefineStepOutput, refine_step
from refine_kernels.linear_logprob import mix_seeds

KEPT = 6  # files of a kind: the first, the last, and some between
LONGEST = 4096  # tokens of a document that are written
_PIECE = 4  # tokens that may share one character


def write_samples(
    folder: Path,
    step: int,
    ids: torch.Tensor,  # [T] int64, one sequence without padding
    output: RefineStepOutput,
    tokenizer,
    context_tokens: int = 40,
    left: int = 0,
) -> None:
    """The rollouts of a batch's first sequence beside the true continuation, best reward first, as text and JSON.

    Args:
        folder: ``samples/`` of the run.
        step: names the files.
        ids: the batch's first sequence.
        output: of the step over the batch.
        tokenizer: turns ids into text.
        context_tokens: how much of the prefix the text shows.
        left: columns of padding before the sequence in its row.
    """
    folder.mkdir(exist_ok=True)
    ids = ids.tolist()
    _, c, n, k = output.rollouts.shape
    order = output.rewards[0].flatten().argsort(descending=True).tolist()
    blocks = [f"step {step}: {c * n} rollouts of at most {k} tokens\n"]
    for place in order:
        j, r = divmod(place, n)
        p, count = int(output.positions[0, j]), int(output.rollout_lengths[0, j, r])
        blocks.append(
            f"--- position {p}  reward {output.rewards[0, j, r]:.4f}  advantage {output.advantages[0, j, r]:+.2f}\n"
            f"context : ...{tokenizer.decode(ids[max(0, p - context_tokens) : p])!r}\n"
            f"rollout : {tokenizer.decode(output.rollouts[0, j, r, :count].tolist())!r}\n"
            f"truth   : {tokenizer.decode(ids[p : p + count])!r}\n"
        )
    text = "\n".join(blocks)
    (folder / f"step-{step:06d}.txt").write_text(text, encoding="utf-8", errors="replace")
    write_document(folder, "step", step, describe_document(ids, output, tokenizer, left))


@torch.no_grad()
def examine_document(model, batch, config: RefineConfig, tokenizer, seed: int) -> dict[str, Any]:
    """A REFINE step on a held-out document, with the run's own selection and reward; nothing is learned from it.

    Args:
        batch: one document: input_ids and attention_mask [1, T], keys [1]; the draws follow from its key alone.
        config: of the run.
        tokenizer: turns ids into text.
        seed: of the run.

    Returns:
        What :func:`describe_document` does.
    """
    config = dataclasses.replace(config, step="shared_prefix", beta=0.0)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    seeds = mix_seeds(seed, batch.keys.to(device))
    output = refine_step(model, input_ids, config, attention_mask=mask, seeds=seeds)
    model.train(was_training)
    return describe_document(input_ids[0, : int(mask.sum())].tolist(), output, tokenizer)


def describe_document(ids: list[int], output: RefineStepOutput, tokenizer, left: int = 0) -> dict[str, Any]:
    """One document with its entropies and rollouts, for JSON.

    Args:
        ids: the first sequence of a batch, without padding.
        output: of a step over the batch; only its first sequence is read.
        tokenizer: turns ids into text.
        left: columns of padding before the sequence in its row.

    Returns:
        ``length`` and ``mean_entropy`` of the whole document; ``stretches`` of it, each with the number of its
        first token, the tokens' texts and the entropy in nats of the prediction of each (None: the very first);
        ``rollouts`` in the order of their positions, with ``percentile``: the share, in percent, of the document's
        predictions whose entropy is lower than at the place that was chosen.
    """
    length, n = len(ids), output.rollouts.shape[2]
    # entropy[t] is of the prediction of token t + 1
    entropy = output.entropy[0, left : left + length - 1].float().cpu()
    positions = output.positions[0].tolist()
    stretches = []
    for first, behind in _stretches(length, positions):
        of_tokens = [None if t == 0 else round(float(entropy[t - 1]), 3) for t in range(first, behind)]
        texts = token_texts(ids[first:behind], tokenizer)
        stretches.append({"first": first, "tokens": texts, "entropy": of_tokens})
    rollouts = []
    for j, p in enumerate(positions):
        chosen = float(output.chosen_entropy[0, j])
        for r in range(n):
            count = int(output.rollout_lengths[0, j, r])
            sampled, truth = output.rollouts[0, j, r, :count].tolist(), ids[p : p + count]
            rollouts.append(
                {
                    "position": p,
                    "entropy": round(chosen, 4),
                    "percentile": round(100 * float((entropy < chosen).float().mean()), 1),
                    "tokens": token_texts(sampled, tokenizer, ids[p - 1 : p]),
                    "truth": token_texts(truth, tokenizer, ids[p - 1 : p]),
                    "match": [a == b for a, b in zip(sampled, truth)],
                    "similarity": [round(x, 3) for x in output.similarity[0, j, r, :count].tolist()],
                    "reward": round(float(output.rewards[0, j, r]), 5),
                    "advantage": round(float(output.advantages[0, j, r]), 4),
                    "cosine": round(float(output.cosine[0, j, r]), 5),
                    "exact_match": round(float(output.exact_match[0, j, r]), 5),
                }
            )
    return {
        "length": length,
        "mean_entropy": round(float(entropy.mean()), 4),
        "stretches": stretches,
        "rollouts": sorted(rollouts, key=lambda rollout: rollout["position"]),
    }


def write_document(folder: Path, kind: str, step: int, document: dict[str, Any]) -> None:
    """Write what :func:`describe_document` gave. Where that makes more than :data:`KEPT` files of the kind
    (``step``, ``held-out``), the one between the nearest neighbours goes."""
    folder.mkdir(exist_ok=True)
    text = json.dumps({"step": step, "kind": kind} | document, ensure_ascii=True)
    write_whole(folder / f"{kind}-{step:06d}.json", text + "\n")
    there = sorted(
        (int(path.stem.rpartition("-")[2]), path)
        for path in folder.glob(f"{kind}-*.json")
        if path.stem.rpartition("-")[2].isdigit()
    )
    while len(there) > KEPT:
        gaps = [there[i + 1][0] - there[i - 1][0] for i in range(1, len(there) - 1)]
        there.pop(1 + gaps.index(min(gaps)))[1].unlink()


def token_texts(ids: Sequence[int], tokenizer, before: Sequence[int] = ()) -> list[str]:
    """The text of each token where it stands; a character of several tokens stands at the first of them.

    Args:
        before: the token that precedes, if any.
    """
    texts: list[str] = []
    group: list[int] = []
    before = list(before)
    lead = _decode(tokenizer, before)
    for number, token in enumerate(ids):
        group.append(token)
        text = _decode(tokenizer, before + group)
        own = text[len(lead) :] if text.startswith(lead) else _decode(tokenizer, group)
        if own.endswith("\ufffd") and len(group) < _PIECE and number + 1 < len(ids):
            continue
        texts += [own, *[""] * (len(group) - 1)]
        before, group = [token], []
        lead = _decode(tokenizer, before)
    return texts


def _decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids) if ids else ""


def _stretches(length: int, positions: list[int]) -> list[tuple[int, int]]:
    """[first, behind) of the tokens to write: all, or as many around every position as fit."""
    if length <= LONGEST:
        return [(0, length)]
    reach = LONGEST // (2 * len(positions))
    found: list[tuple[int, int]] = []
    for p in sorted(positions):
        first, behind = max(0, p - reach), min(length, p + reach)
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], behind)
        else:
            found.append((first, behind))
    return found
