"""What a resumed run takes from its checkpoint, and what from its settings; anything else is refused.

Weights, the optimizer's moments, the data's position, counters and random states are the checkpoint's. Of settings
that differ from the checkpoint's, those in :data:`FIXED` (and what decides the order of the data) are refused; all
others are applied from the next update on, and listed. The table stands in docs/reliability.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from refine.data.document import DataError
from refine.settings import SettingsError, differences, kinds_of, read_yaml, short
from refine.training.checkpoint import CheckpointError
from refine.training.settings import TrainSettings

FIXED = (
    "model_name_or_path", "model_type", "config_overrides", "mimetic_init", "tokenizer_name_or_path", "seed",
    "use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save",
)  # fmt: skip
FREE = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "device", "run_name", "report_to")


def compare_settings(
    settings: TrainSettings, folder: Path, state: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """name -> (then, now) of the settings that change with this resumption.

    Raises:
        SettingsError: one that cannot change is another.
    """
    now = {name: getattr(settings, name) for name in kinds_of(TrainSettings)}
    found = differences(state.get("settings") or _settings_beside(folder), now)
    for name, (then, value) in found.items():
        if name in FIXED and not _same_path(then, value):
            raise SettingsError(
                f"{name} is {short(value)}, but {folder} was made with {short(then)}, and a run keeps it. To begin "
                f"a new run from its weights: --model_name_or_path {folder}"
            )
    if "phase" in found and {"post", "grpo"} & set(found["phase"]):
        raise SettingsError(
            f"phase is {settings.phase}, but {folder} was made in phase {found['phase'][0]}, which reads other "
            f"data. To begin a new run from its weights: --model_name_or_path {folder}"
        )
    return {name: pair for name, pair in found.items() if name not in (*FREE, *FIXED)}


def describe(changes: dict[str, tuple[Any, Any]]) -> str:
    """The changes, in one line."""
    return ", ".join(f"{name} {short(then)} -> {short(now)}" for name, (then, now) in changes.items())


def restore_schedule(
    schedule: torch.optim.lr_scheduler.LambdaLR, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Put the schedule to the update where it stood; rates and form are those of the settings now.

    Raises:
        CheckpointError: the state holds no such place.
    """
    place = state.get("last_epoch")
    if not isinstance(place, int) or place < 0:
        raise CheckpointError(f"the schedule's place in the checkpoint is {place!r}")
    schedule.last_epoch, schedule._step_count = place, place + 1
    rates = [base * factor(place) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas)]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    schedule._last_lr = rates


def restore_position(stream: Any, folder: Path, state: dict[str, Any]) -> None:
    """Put the data to where it stood.

    Raises:
        DataError: it is other data, or read in another way.
        CheckpointError: the position cannot be read.
    """
    try:
        stream.load_state_dict(state)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the data's position in {folder} cannot be read: {error}") from error


def _settings_beside(folder: Path) -> dict[str, Any]:
    """Of a checkpoint of an earlier version: the settings that its run noted."""
    try:
        return dict(read_yaml(folder.resolve().parent / "config.yaml") or {})
    except (SettingsError, ValueError, TypeError):
        return {}


def _same_path(one: Any, other: Any) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()
