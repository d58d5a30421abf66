"""From settings to the parts of a run: model, tokenizer, device, what to read."""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from refine.models import load_model, new_model
from refine.training.data import DataConfig
from refine.training.settings import SettingsError, TrainSettings


def load_parts(settings: TrainSettings, resume: Path | None) -> tuple[Any, Any]:
    """The model and its tokenizer: of the checkpoint resumed, the model named, the type asked for, or the
    package's own.
    """
    if settings.model_type is not None and resume is None:
        source = settings.tokenizer_name_or_path or packaged_model()
        tokenizer = _load_tokenizer(source)
        overrides = {"vocab_size": len(tokenizer)} | _special_tokens(tokenizer) | settings.config_overrides
        _check_vocabulary(tokenizer, overrides["vocab_size"])
        try:
            model = new_model(
                settings.model_type, seed=settings.seed, mimetic_init=settings.mimetic_init, **overrides
            )
        except (ValueError, TypeError) as error:
            raise SettingsError(str(error)) from error
    else:
        path = resume or settings.model_name_or_path or packaged_model()
        try:
            model = load_model(path, dtype=torch.float32)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        tokenizer = _load_tokenizer(settings.tokenizer_name_or_path or path)
        _check_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer


def packaged_model() -> Path:
    """The folder of the tiny DeltaNet that comes with this package."""
    return Path(str(resources.files("refine") / "assets" / "tiny-delta-net"))


def choose_device(settings: TrainSettings) -> torch.device:
    """The device asked for, else a GPU if there is one, else the CPU."""
    try:
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(
            f"device {settings.device!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device


def data_config(settings: TrainSettings) -> DataConfig:
    """The part of the settings that says what to read and how to cut it."""
    names = {f.name for f in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: getattr(settings, name) for name in names})


def _check_vocabulary(tokenizer, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} entries but the model's vocab_size is {vocab_size}: "
            "name the tokenizer that belongs to the model (tokenizer_name_or_path)"
        )


def _load_tokenizer(source: str | Path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (
            str(error).split("\n")[0]
            if Path(source).exists()
            else "it is neither a folder nor a hub name here"
        )
        raise SettingsError(f"no tokenizer can be loaded from {str(source)!r}: {reason}") from error
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _special_tokens(tokenizer) -> dict[str, int | None]:
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
