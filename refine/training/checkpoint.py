"""Checkpoints: Hugging Face weights beside the training state, written whole or not at all.

A checkpoint is written into a folder beside its place and renamed when it is complete, so a crash while saving
leaves the last good one. Nothing is read that could run code: weights are safetensors, and the training state
is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from refine.training.optimizer_state import load_state_by_name, read_shards, shard_path, state_by_name
from refine.training.parallel import World, full_weights, unwrap

TRAINING_STATE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: the message says which and why."""


def save_checkpoint(
    output_dir: Path,
    step: int,
    model,
    optimizer,
    tokenizer,
    state: dict[str, Any],
    keep: int | None,
    world: World = World(),  # noqa: B008
) -> Path:
    """Write ``output_dir/checkpoint-{step}`` and remove the oldest beyond ``keep``. Every process calls it."""
    final = output_dir / f"checkpoint-{step}"
    save_folder(final, model, tokenizer, state, optimizer, world)
    if keep is not None and world.is_main:
        for old in list_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def save_folder(
    final: Path,
    model,
    tokenizer,
    state: dict[str, Any] | None = None,
    optimizer=None,
    world: World = World(),  # noqa: B008
) -> None:
    """Weights, configuration and tokenizer in Hugging Face layout, and the training state if there is one.

    Under FSDP2 the weights are gathered on the main process and the optimizer's state is written by shards.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    partial = final.with_name(final.name + ".partial")
    bare, sharded = unwrap(model), world.mode == "fsdp2"
    try:
        weights = full_weights(model) if sharded else None
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.wait()
        if sharded and optimizer is not None:
            shards = state_by_name(bare, optimizer)
            torch.save(shards, shard_path(partial, world.rank, world.size))
        if world.is_main:
            bare.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if state is not None:
                whole = {} if sharded else {"optimizer": state_by_name(bare, optimizer)}
                torch.save(state | whole | {"random": random_state()}, partial / TRAINING_STATE)
        world.wait()
        if world.is_main:
            for path in partial.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
        world.wait()
    except (OSError, RuntimeError) as error:
        if world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{final} could not be written ({error}); earlier checkpoints are intact"
        ) from error


def restore_optimizer(folder: Path, state: dict[str, Any], model, optimizer) -> None:
    """Put the optimizer's state back, however many processes wrote it.

    Raises:
        CheckpointError: a part of it is missing or cannot be read.
    """
    try:
        saved = state["optimizer"] if "optimizer" in state else read_shards(folder)
    except Exception as error:  # a torn file fails in many ways; each means the same to the user
        raise CheckpointError(f"the optimizer's state in {folder} cannot be read: {error}") from error
    load_state_by_name(unwrap(model), optimizer, saved)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def load_training_state(folder: Path) -> dict[str, Any]:
    """The training state of one checkpoint, whose weights and optimizer state are there and whole.

    Raises:
        CheckpointError: it has none, or something of it cannot be read.
    """
    path = folder / TRAINING_STATE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TRAINING_STATE}: it can be used as a model, not resumed")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if "optimizer" not in state:
            path = folder
            read_shards(folder)
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise FileNotFoundError(f"{folder} has no weights")
        for path in weights:  # a file cut short does not agree with its header
            with safe_open(path, framework="pt"):
                pass
    except Exception as error:  # a torn file fails in many ways; each means the same to the user
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return state


def find_resume(output_dir: Path, wanted: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, with its training state; None: start afresh.

    Args:
        output_dir: the run's folder.
        wanted: ``none``, ``auto`` (the newest that can be read; broken ones are named and passed over), or a
            folder.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        folder = Path(wanted)
        if not folder.is_dir():
            raise CheckpointError(f"resume_from_checkpoint: there is no folder {wanted!r}")
        return folder, load_training_state(folder)
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            return folder, load_training_state(folder)
        except CheckpointError as error:
            print(f"passing over a broken checkpoint: {error}")
    return None


def clear_partial(output_dir: Path) -> None:
    """Remove what a run left behind that was killed while it saved."""
    for path in output_dir.glob("*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """Every random generator's state, as tensors and plain values."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
