"""Checkpoints: Hugging Face weights beside the training state, written whole or not at all, and checked.

A checkpoint is written into a folder beside its place and renamed when it is complete and on the disk, so a crash
while saving leaves the one before. A model that is not finite is not saved. ``checksums.json`` holds the size and
CRC-32 of every file; before a run goes on, all of them are compared. Nothing is read that could run code: weights
are safetensors, and the training state is loaded with ``weights_only=True``.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from refine.files import why
from refine.finite import first_not_finite
from refine.models.adapters import ADAPTER_CONFIG, base_of, holds_adapters
from refine.training.optimizer_state import load_state_by_name, read_shards, shard_path, state_by_name
from refine.training.parallel import World, full_weights, unwrap

TRAINING_STATE = "training_state.pt"
CHECKSUMS = "checksums.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_STATE_KEYS = ("schedule", "data", "counters", "random")
_OURS = re.compile(  # names of files that save_folder writes
    r"(generation_|adapter_)?config\.json|.*\.safetensors|model\.safetensors\.index\.json|tokenizer(_config)?\.json|"
    r"special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|(tokenizer|spiece)\.model|"
    rf"chat_template\.jinja|{re.escape(TRAINING_STATE)}|{re.escape(CHECKSUMS)}|optimizer-\d+-of-\d+\.pt"
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: the message says which and why."""


class NotFiniteError(RuntimeError):
    """A model that must not be saved: a parameter of it is not finite."""


def save_folder(
    final: Path,
    model,
    tokenizer,
    state: dict[str, Any] | None = None,
    optimizer=None,
    world: World = World(),  # noqa: B008
) -> None:
    """Weights, configuration and tokenizer in Hugging Face layout, and the training state if there is one.

    Every process calls it. Under FSDP2 the weights are gathered on rank 0 and the optimizer's state is written
    by shards.

    Raises:
        NotFiniteError: a parameter, or a moment of the optimizer, is not finite; nothing is written.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    bare, sharded = unwrap(model), world.mode == "fsdp2"
    _check_finite(bare, optimizer, world)
    partial = final.with_name(f"{final.name}.partial")
    try:
        weights = full_weights(model) if sharded else None
        if world.is_main:
            remove_folder(partial)
            partial.mkdir(parents=True)
        world.wait()
        if sharded and optimizer is not None:
            torch.save(state_by_name(bare, optimizer), shard_path(partial, world.rank, world.size))
        if world.is_main:
            _save_weights(partial, bare, weights)
            tokenizer.save_pretrained(partial)
            if state is not None:
                whole = {} if sharded else {"optimizer": state_by_name(bare, optimizer)}
                torch.save(state | whole | {"random": random_state()}, partial / TRAINING_STATE)
        world.wait()
        if world.is_main:
            _write_checksums(partial)
            _put_in_place(partial, final)
        world.wait()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = why(error, partial.parent)
        if world.is_main:
            remove_folder(partial)
        raise CheckpointError(f"{final} could not be written: {reason}") from error


def _save_weights(folder: Path, bare, weights: dict[str, torch.Tensor] | None) -> None:
    """The model's weights, or of a model with adapters these alone."""
    if base_of(bare) is bare:
        bare.save_pretrained(folder, state_dict=weights)
        return
    bare.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card


def restore_optimizer(folder: Path, state: dict[str, Any], model, optimizer) -> None:
    """Put the optimizer's state back, however many processes wrote it.

    Raises:
        CheckpointError: a part of it is missing, cannot be read, or belongs to another model.
    """
    try:
        saved = state["optimizer"] if "optimizer" in state else read_shards(folder)
    except Exception as error:  # a torn file fails in many ways; each means the same to the user
        raise CheckpointError(f"the optimizer's state in {folder} cannot be read: {error}") from error
    updates = state["counters"]["step"] - state["counters"].get("skipped", 0)
    try:
        load_state_by_name(unwrap(model), optimizer, saved, updates)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the optimizer's state in {folder} does not fit the model: {error}") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders named checkpoint-N, by number."""
    found = [(int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def step_of(folder: Path) -> int | None:
    """The number of a checkpoint's folder."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def load_training_state(folder: Path) -> dict[str, Any]:
    """The training state of one checkpoint, every file of which is there and as it was written.

    Raises:
        CheckpointError: it has none, or something of it cannot be read, was changed, or is not finite.
    """
    path = folder
    try:
        if not (folder / TRAINING_STATE).is_file():
            raise CheckpointError(f"{folder} has no {TRAINING_STATE}: it can be used as a model, not resumed")
        _compare_checksums(folder)
        for path in sorted(folder.glob("*.json")):
            json.loads(path.read_text(encoding="utf-8"))
        path = folder / TRAINING_STATE
        state = torch.load(path, weights_only=True, map_location="cpu")
        _check_state(state)
        if "optimizer" not in state:
            path = folder
            read_shards(folder)
        path = folder / (ADAPTER_CONFIG if holds_adapters(folder) else "config.json")
        path.stat()
        _check_weights(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a torn file fails in many ways; each means the same to the user
        reason = why(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be read: {reason.splitlines()[0]}") from error
    return state


def find_resume(output_dir: Path, wanted: str) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, with its training state; None: start anew.

    Args:
        output_dir: the run's folder.
        wanted: ``none``, ``auto`` (the newest that can be read; broken ones are named and passed over), or a
            folder.

    Raises:
        CheckpointError: the folder that was named cannot be resumed, or with ``auto`` none of those there.
    """
    if wanted == "none":
        return None
    if wanted != "auto":
        folder = Path(wanted)
        if not folder.is_dir():
            raise CheckpointError(f"resume_from_checkpoint: there is no folder {wanted!r}")
        return folder, load_training_state(folder)
    broken: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            state = load_training_state(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for sentence in broken:
            print(f"passing over a broken checkpoint: {sentence}")
        return folder, state
    if broken:
        raise CheckpointError(
            f"resume_from_checkpoint auto: none of {len(broken)} checkpoints can be read; {broken[0]}. "
            "Nothing was changed; move them away to start anew"
        )
    return None


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint or model that was written here: the files that :func:`save_folder` writes, and the
    folder if nothing else is in it. Links are left alone."""
    if folder.is_symlink() or not folder.is_dir():
        return
    if _NAME.fullmatch(folder.name) or folder.name == "final":  # half removed it must not look like one
        doomed = folder.with_name(f"{folder.name}.partial")
        if not doomed.exists():
            folder = folder.rename(doomed)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and (path.is_file() or path.is_symlink()):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def holds_only_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but files that :func:`save_folder` writes."""
    return all(_OURS.fullmatch(path.name) for path in folder.iterdir())


def clear_partial(output_dir: Path) -> None:
    """Remove what a run left behind that was killed while it saved; put back what it was about to replace."""
    for path in output_dir.glob("*.old.partial"):
        whole = output_dir / path.name.removesuffix(".old.partial")
        if _is_place(whole) and not whole.exists():
            path.rename(whole)
    for path in output_dir.glob("*.partial"):
        if _is_place(Path(path.name.removesuffix(".partial").removesuffix(".old"))):
            remove_folder(path)


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


def _is_place(path: Path) -> bool:
    return path.name == "final" or _NAME.fullmatch(path.name) is not None


def _check_finite(model, optimizer, world: World) -> None:
    named = dict(model.named_parameters())
    broken = first_not_finite(named)
    if broken is None and optimizer is not None:
        moments = {
            f"{key} of {name}": value
            for name, parameter in named.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor) and value.ndim
        }
        broken = first_not_finite(moments)
    if world.any(broken is not None):
        raise NotFiniteError(broken or "a parameter in another process")


def _write_checksums(folder: Path) -> None:
    """Put every file on the disk, and note its size and CRC-32."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor() as pool:
        sums = dict(zip((path.name for path in paths), pool.map(_checksum, paths)))
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        json.dump({"files": sums}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> list[int]:
    value, size = 0, 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            value, size = zlib.crc32(block, value), size + len(block)
    return [size, value]


def _compare_checksums(folder: Path) -> None:
    if not (folder / CHECKSUMS).is_file():  # of an earlier version
        return
    noted = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
    for name in noted:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(noted, pool.map(lambda name: _checksum(folder / name), noted)))
    for name, (size, value) in noted.items():
        if found[name] != [size, value]:
            change = f"has {found[name][0]} bytes of {size}" if found[name][0] != size else "was changed"
            raise CheckpointError(f"{folder / name} {change} since it was written (see {CHECKSUMS})")


def _check_state(state: Any) -> None:
    """Whether a training state has its parts, of the right kind."""
    for key in _STATE_KEYS:
        if not isinstance(state.get(key), dict):
            raise ValueError(f"it has no {key!r}")
    for key, value in state["counters"].items():
        if not isinstance(value, float if key == "seconds" else int) or not 0 <= value < math.inf:
            raise ValueError(f"counters: {key} is {value!r}")
    if not isinstance(state["counters"].get("step"), int):
        raise ValueError("counters has no 'step'")
    now = random_state()
    if len(state["random"]["python"][1]) != len(now["python"][1]):
        raise ValueError("random: the state of Python's generator is cut short")
    if state["random"]["torch"].shape != now["torch"].shape:
        raise ValueError("random: the state of torch's generator is cut short")


def _check_weights(folder: Path) -> None:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} has no weights")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:  # a file cut short does not agree with its header
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if first_not_finite({name: file.get_tensor(name)}):
                        raise CheckpointError(f"{path}: {name} is not finite")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {why(error)}") from error


def _put_in_place(partial: Path, final: Path) -> None:
    """Rename a complete folder; what stood in its place goes last."""
    old = final.with_name(f"{final.name}.old.partial")
    remove_folder(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    remove_folder(old)
