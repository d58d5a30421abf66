"""What training and evaluation both need before they begin: from the settings that they share the model, its
tokenizer, the device and what to read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from refine.data.rows import first_line
from refine.data.stream import DataConfig
from refine.files import why
from refine.finite import first_not_finite
from refine.method.config import RefineConfig
from refine.method.rewards import REWARDS, find_reward
from refine.models import load_model, new_model
from refine.models.adapters import ALL_LINEAR, add_adapters, holds_adapters, load_adapted
from refine.settings import SettingsError
from refine.shared_settings import ModelSettings, NewModelSettings

BACKENDS = ("triton", "torch", "reference")


def load_model_and_tokenizer(
    chosen: ModelSettings, new: NewModelSettings | None = None, checkpoint: Path | None = None
) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer: of the checkpoint, the type asked for, the model named, or the
    package's own.

    Raises:
        SettingsError: neither can be had.
        FileNotFoundError: nothing is there.
    """
    if new is not None and new.model_type is not None and checkpoint is None:
        tokenizer = _load_tokenizer(chosen.tokenizer_name_or_path or packaged_model())
        overrides = {"vocab_size": len(tokenizer)} | _special_tokens(tokenizer) | new.config_overrides
        _check_vocabulary(tokenizer, overrides["vocab_size"])
        try:
            model = new_model(new.model_type, seed=chosen.seed, mimetic_init=new.mimetic_init, **overrides)
        except (ValueError, TypeError) as error:
            raise SettingsError(str(error)) from error
        return model, tokenizer
    path = checkpoint or chosen.model_name_or_path or packaged_model()
    _check_readable(Path(path))
    try:
        model = _load(path, chosen, continued=checkpoint is not None)
    except FileNotFoundError:
        raise
    except (ValueError, OSError) as error:
        raise SettingsError(str(error).split("\n")[0]) from error
    except (RuntimeError, SafetensorError) as error:  # weights of another shape, a torn file
        raise SettingsError(
            f"the model {str(path)!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    _align(model)
    if name := first_not_finite(dict(model.named_parameters())):
        raise SettingsError(f"{path}: the weights are not finite ({name})")
    tokenizer = _load_tokenizer(chosen.tokenizer_name_or_path or path)
    _check_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer


def _load(path: str | Path, chosen: ModelSettings, continued: bool) -> torch.nn.Module:
    """The model in float32; with ``use_peft``, under adapters: those of the folder, or new ones."""
    if not getattr(chosen, "use_peft", False):
        return load_model(path, dtype=torch.float32)
    if not holds_adapters(path):
        model = load_model(path, dtype=torch.float32)
        named = chosen.lora_target_modules
        return add_adapters(
            model, path, seed=chosen.seed, r=chosen.lora_r, lora_alpha=chosen.lora_alpha,
            lora_dropout=chosen.lora_dropout, modules_to_save=chosen.lora_modules_to_save,
            target_modules=ALL_LINEAR if named == [ALL_LINEAR] else named,
        )  # fmt: skip
    model = load_adapted(path, lambda base: load_model(base, dtype=torch.float32))
    found = model.peft_config["default"]
    for name in () if continued else ("r", "lora_alpha", "lora_dropout"):
        given = getattr(chosen, "lora_r" if name == "r" else name)
        if given != getattr(found, name):
            raise SettingsError(
                f"lora_{name.removeprefix('lora_')} is {given:g}, but the adapters in {str(path)!r}, whose "
                f"training goes on, have {getattr(found, name):g}"
            )
    return model


def check_environment() -> None:
    """Whether the environment variables that kernels read are what they may be.

    Raises:
        SettingsError: one is not.
    """
    backend = os.environ.get("REFINE_KERNELS_BACKEND")
    if backend is not None and backend not in BACKENDS:
        raise SettingsError(
            f"REFINE_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}, or not be set; it is {backend!r}"
        )


def try_reward(config: RefineConfig, hidden_size: int) -> None:
    """Call a reward of the user's own once, on made-up rollouts, before anything is written.

    Raises:
        SettingsError: it fails, or returns something else than one finite number per rollout.
    """
    if config.reward in REWARDS:
        return
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, (3, config.rollout_length), generator=generator) for _ in range(2)]
    hidden = [torch.randn(3, config.rollout_length, hidden_size, generator=generator) for _ in range(2)]
    wanted = "a function of predicted ids [R, k], true ids [R, k], predicted and true hidden states [R, k, D]"
    try:
        given = find_reward(config.reward)(*ids, *hidden)
    except Exception as error:
        raise SettingsError(
            f"reward {config.reward!r} must be {wanted}; called so, it raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(given, torch.Tensor) or given.shape != (3,):
        what = f"a tensor {tuple(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
        raise SettingsError(
            f"reward {config.reward!r} must return one number per rollout, a tensor of shape (3,) for 3; got {what}"
        )
    if given.is_complex() or not given.float().isfinite().all():
        raise SettingsError(f"reward {config.reward!r} must return finite numbers, got {given.tolist()}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says so; on a CPU PyTorch raises a plain RuntimeError."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return out_of_memory or "can't allocate memory" in str(error)


def packaged_model() -> Path:
    """The folder of the tiny DeltaNet that comes with this package."""
    return Path(str(resources.files("refine") / "assets" / "tiny-delta-net"))


def choose_device(name: str | None) -> torch.device:
    """The device asked for, else a GPU if there is one, else the CPU.

    Raises:
        SettingsError: it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def data_config(settings: Any) -> DataConfig:
    """The part of the settings that says what to read and how to cut it."""
    names = {f.name for f in dataclasses.fields(DataConfig)}
    return DataConfig(**{name: getattr(settings, name) for name in names if hasattr(settings, name)})


@torch.no_grad()
def _align(model: torch.nn.Module) -> None:
    """Copy parameters out of the mapped file. There they lie at addresses that the length of the file's header
    decides, and CPU kernels round differently at other alignments: a resumed run would not be the run, bit for bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _check_readable(folder: Path) -> None:
    """Whether the files of a local model may be read; elsewhere a missing permission reads like a missing file."""
    if not folder.is_dir():
        return
    try:
        for path in folder.iterdir():
            if path.suffix in (".json", ".safetensors"):
                path.open("rb").close()
            if path.name in ("config.json", "tokenizer_config.json"):
                dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"the model {str(folder)!r} cannot be read: {why(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise SettingsError(f"{path} is no whole JSON object: {first_line(error)}") from error


def _check_vocabulary(tokenizer, vocab_size: int) -> None:
    if len(tokenizer) > vocab_size:
        raise SettingsError(
            f"the tokenizer has {len(tokenizer)} entries but the model's vocab_size is {vocab_size}: "
            "name the tokenizer that belongs to the model (tokenizer_name_or_path)"
        )


def _load_tokenizer(source: str | Path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
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
