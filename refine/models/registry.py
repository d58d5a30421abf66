"""The models there are. A model is one file that ends in ``@register_model``, and a line in ``refine.models``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


@dataclass(frozen=True)
class ModelEntry:
    """A registered model.

    Attributes:
        model_class: with its ``config_class`` and ``body_class``.
        short_names: what else its type may be called where a new model is made.
        tiny: settings of a small model that trains on a CPU within minutes.
        auto: whether ``transformers``' auto classes load it.
    """

    model_class: type[PreTrainedModel]
    short_names: tuple[str, ...] = ()
    tiny: Mapping[str, Any] = field(default_factory=dict)
    auto: bool = True


ENTRIES: dict[str, ModelEntry] = {}  # model type -> entry
MODELS: dict[str, type[PreTrainedModel]] = {}  # model type -> class


def register_model(
    *short_names: str,
    tiny: Mapping[str, Any] | None = None,
    model_types: tuple[str, ...] | None = None,
    auto: bool = True,
) -> Callable[[type], type]:
    """A class decorator: make a model loadable by its type, here and through ``transformers``' auto classes.

    The class states ``config_class`` (whose ``model_type`` is the name in ``config.json``) and ``body_class``.

    Args:
        *short_names: what else its type may be called where a new model is made.
        tiny: settings of a small model that trains on a CPU within minutes.
        model_types: the types in ``config.json`` that this class loads; default: its configuration's own.
        auto: also through the auto classes; False for types that ``transformers`` has a class of its own for.
    """

    def register(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
        for model_type in model_types or (model_class.config_class.model_type,):
            ENTRIES[model_type] = ModelEntry(model_class, short_names, dict(tiny or {}), auto)
            MODELS[model_type] = model_class
        if auto:
            _register_auto_classes(model_class)
        return model_class

    return register


def resolve_type(name: str) -> str:
    """The model type that ``name`` stands for.

    Raises:
        ValueError: none does.
    """
    for model_type, entry in ENTRIES.items():
        if name == model_type or name in entry.short_names:
            return model_type
    raise ValueError(f"model_type must be one of {', '.join(sorted(MODELS))}, got {name!r}")


def registered_class(model_type: str) -> str:
    """The class that ``AutoModelForCausalLM`` loads for a model type, as ``module.Class``.

    flash-linear-attention registers classes of its own for ``delta_net`` and ``gated_deltanet`` when ``fla.models``
    is imported; whichever of the two packages is imported last owns the auto classes. ``refine.load_model`` and
    this project's own classes load ours in any order; :func:`register_auto_classes` puts ours back.

    Raises:
        ValueError: no class is registered for the type.
    """
    model_class = _registered(model_type)
    if model_class is None:
        raise ValueError(f"model_type {model_type!r} is not registered with AutoModelForCausalLM")
    return f"{model_class.__module__}.{model_class.__name__}"


def _registered(model_type: str) -> type | None:
    if model_type not in CONFIG_MAPPING:
        return None
    return AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[model_type], None)


def register_auto_classes(quiet: bool = False) -> None:
    """Make ``transformers``' auto classes load these models, also after another package has taken their types.

    Args:
        quiet: do not warn where a class of another package is replaced.
    """
    for entry in ENTRIES.values():
        if entry.auto:
            _register_auto_classes(entry.model_class, quiet)


def _register_auto_classes(model_class: type[PreTrainedModel], quiet: bool = False) -> None:
    config_class = model_class.config_class
    other = _registered(config_class.model_type)
    if other is not None and other is not model_class and not quiet:
        warnings.warn(
            f"AutoModelForCausalLM now loads {model_class.__module__}.{model_class.__name__} for model_type "
            f"{config_class.model_type!r}, in the place of {other.__module__}.{other.__name__}",
            stacklevel=4,
        )
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class.body_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    # by this table a Trainer knows that label smoothing has to shift the labels
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(config_class.model_type, model_class.__name__)
