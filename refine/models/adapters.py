"""LoRA adapters (arXiv 2106.09685) through PEFT, in PEFT's own layout: trained and saved beside a frozen base.

A folder of adapters (``adapter_config.json``) names its base model. :func:`load_merged` gives a plain model of the
two together, :func:`load_adapted` goes on training the adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from refine.shared_settings import ALL_LINEAR

ADAPTER_CONFIG = "adapter_config.json"


def holds_adapters(path_or_name: str | Path) -> bool:
    """Whether a folder holds adapters, and no model."""
    path = Path(path_or_name)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def find_adapters(path_or_name: str | Path, where: dict[str, Any]) -> bool:
    """The same of a hub name; ``where``: ``revision``, ``subfolder``, ``token``, ``cache_dir``."""
    try:
        return find_adapter_config_file(str(path_or_name), **where) is not None
    except (OSError, ValueError):
        return False


def base_of(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def add_adapters(
    model: nn.Module,
    base: str | Path,
    *,
    seed: int = 0,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    modules_to_save: Sequence[str] | None = None,
) -> nn.Module:
    """``model`` with new adapters, which alone are trained; its output is unchanged until they are.

    Args:
        model: one of this project's models.
        base: the folder or hub name that it was loaded from, which the adapters will name.
        seed: of the adapters' random weights; torch's global generator is left as it is.
        r: their rank.
        lora_alpha: their output is scaled by ``lora_alpha / r``.
        lora_dropout: on their input, in training.
        target_modules: names of linear maps (``q_proj``), or ``all-linear``: all but the head.
        modules_to_save: modules that are trained and saved whole.

    Raises:
        ValueError: there is no such module, or it cannot be adapted.
    """
    from peft import LoraConfig, get_peft_model

    named = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, target_modules=named,
        modules_to_save=list(modules_to_save) if modules_to_save else None,
        base_model_name_or_path=_absolute(base),
    )  # fmt: skip
    if unknown := sorted(set(modules_to_save or ()) - _last_names(model)):
        raise ValueError(f"lora_modules_to_save: the model has no module {unknown[0]!r}")
    if not isinstance(named, str) and (
        unknown := [n for n in named if n.split(".")[-1] not in _linears(model)]
    ):
        raise ValueError(
            f"lora_target_modules: the model has no linear map {unknown[0]!r}; "
            f"it has {', '.join(sorted(_linears(model)))}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = _absolute(base)
    return adapted


def load_adapted(path: str | Path, load: Callable[[str], nn.Module]) -> nn.Module:
    """The base model of a folder of adapters (``load`` loads it by the name that they give), with the adapters,
    which alone are trained."""
    from peft import PeftConfig, PeftModel

    base = load(PeftConfig.from_pretrained(str(path)).base_model_name_or_path)
    return PeftModel.from_pretrained(base, str(path), is_trainable=True)


def load_merged(
    path_or_name: str | Path, where: dict[str, Any], load: Callable[[str], nn.Module]
) -> nn.Module:
    """A plain model: the base of a folder or hub name of adapters with these merged into its weights. Where an
    adapted head was tied to the embeddings, it is no longer."""
    from peft import PeftConfig, PeftModel

    where = {name: value for name, value in where.items() if value is not None}
    config = PeftConfig.from_pretrained(str(path_or_name), **where)
    base = load(config.base_model_name_or_path)
    adapted = PeftModel.from_pretrained(base, str(path_or_name), **where)
    if base.config.tie_word_embeddings and _is_wrapped(base.lm_head, base.get_input_embeddings()):
        base.config.tie_word_embeddings = False
        inner = getattr(base.lm_head, "base_layer", base.lm_head)
        if isinstance(inner, nn.Linear):
            inner.weight = nn.Parameter(inner.weight.detach().clone())
    return adapted.merge_and_unload()


class WithoutAdapters(nn.Module):
    """A model without its adapters: the reference of a run that trains them, for no further memory."""

    def __init__(self, adapted: nn.Module):
        super().__init__()
        self.adapted = adapted

    def forward(self, *inputs, **options):
        """The base model's output."""
        with self.adapted.disable_adapter():
            return self.adapted(*inputs, **options)


def _absolute(base: str | Path) -> str:
    path = Path(base)
    return str(path.resolve()) if path.exists() else str(base)


def _is_wrapped(*modules: nn.Module) -> bool:
    return any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in modules)


def _linears(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _last_names(model: nn.Module) -> set[str]:
    return {name.split(".")[-1] for name, _ in model.named_modules()}
