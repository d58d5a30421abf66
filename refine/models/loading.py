"""From a folder or a hub name to a model: published checkpoints as they are."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.utils import CONFIG_NAME, logging

from refine.models.adapters import find_adapters, holds_adapters, load_merged
from refine.models.causal_lm import FastWeightForCausalLM
from refine.models.initialization import mimetic_init_
from refine.models.registry import MODELS, resolve_type

LOADING_OPTIONS = frozenset(
    {"dtype", "revision", "subfolder", "token", "device_map", "use_safetensors", "cache_dir"}
)


def load_model(path_or_name: str | Path, **overrides) -> FastWeightForCausalLM:
    """Load a registered model (:data:`MODELS`) from a local folder or a hub name.

    Args:
        path_or_name: a folder with ``config.json`` and safetensors weights, or a hub name; also one of LoRA
            adapters in PEFT's layout, which are merged into the weights of the base model that they name.
        **overrides: ``dtype`` or ``torch_dtype`` (default: the checkpoint's), ``revision``, ``subfolder``,
            ``token``, ``cache_dir``, ``device_map``, ``use_safetensors`` (default True: no pickle unless you
            say otherwise), as for ``from_pretrained``; any other key overrides one of the configuration.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an unsupported ``model_type`` or configuration value, an unknown override (the nearest name is
            said), or weights that are missing or unknown (they are listed).
    """
    dtype = _one_dtype(overrides, "load_model")
    loading = {key: overrides.pop(key) for key in LOADING_OPTIONS & overrides.keys()}
    where = {key: loading[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in loading}
    if holds_adapters(path_or_name):
        return _load_base_and_merge(path_or_name, where, overrides | loading, dtype)
    try:
        model_type, keys = _read_config(path_or_name, where)
    except FileNotFoundError:
        if Path(path_or_name).exists() or not find_adapters(path_or_name, where):
            raise
        return _load_base_and_merge(path_or_name, where, overrides | loading, dtype)
    model_class = MODELS[model_type]
    config_class = model_class.config_class
    config_class.check_settings(overrides, "load_model", also=LOADING_OPTIONS)
    config = config_class.from_dict(keys | overrides)
    loading["dtype"] = "auto" if dtype is None else dtype
    loading.setdefault("use_safetensors", True)
    with _without_report():  # what it would list is listed below
        model, info = model_class.from_pretrained(
            path_or_name, config=config, output_loading_info=True, **loading
        )
    info["unexpected_keys"] = _without_skipped(model, path_or_name, info["unexpected_keys"])
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[kind])
        if config.tie_word_embeddings:
            names = [name for name in names if name != "lm_head.weight"]
        if names:
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise ValueError(
                f"{path_or_name}: {len(names)} {kind.replace('_', ' ')} for {model_type}: {listed}"
            )
    return model


def _load_base_and_merge(
    path_or_name: str | Path, where: dict, options: dict, dtype: torch.dtype | str | None
) -> FastWeightForCausalLM:
    options = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    return load_merged(path_or_name, where, lambda base: load_model(base, dtype=dtype, **options))


def _without_skipped(model: FastWeightForCausalLM, path_or_name: str | Path, names) -> list[str]:
    """The names but for those of parts that this model leaves in the checkpoint, which one warning names."""
    left: dict[str, int] = {}
    rest = []
    for name in map(str, names):
        part = next((part for prefix, part in model.skipped_weights.items() if name.startswith(prefix)), None)
        if part is None:
            rest.append(name)
        else:
            left[part] = left.get(part, 0) + 1
    if left:
        parts = " and ".join(f"{part} ({count} tensors)" for part, count in sorted(left.items()))
        warnings.warn(f"{path_or_name}: only the language model is loaded, not {parts}", stacklevel=3)
        model.left_in_checkpoint = (str(path_or_name), parts)
    return rest


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """``transformers`` prints a table of names when it loads; errors are still printed."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def new_model(
    model_type: str, *, seed: int = 0, mimetic_init: bool = False, **settings
) -> FastWeightForCausalLM:
    """A freshly initialised model of the given type.

    Args:
        model_type: ``delta_net``, ``gated_deltanet``, ``lact_swiglu`` (``lact`` for short), ``qwen3_5``,
            ``qwen3_5_moe``, ``qwen3_next`` or ``olmo_hybrid``.
        seed: of the random weights; torch's global generator is left as it is.
        mimetic_init: begin near in-context recall, see :mod:`refine.models.initialization`.
        **settings: of the model's configuration, and ``dtype`` (a torch.dtype or its name; default float32).

    Raises:
        ValueError: the type is none of ours, or a setting cannot be.
    """
    model_type = resolve_type(model_type)
    config_class = MODELS[model_type].config_class
    config_class.check_settings(settings, "new_model")
    dtype = _one_dtype(settings, "new_model")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[model_type](config_class(**settings))
        model = mimetic_init_(model) if mimetic_init else model
    return model if dtype is None else model.to(dtype)


def _one_dtype(options: dict, where: str) -> torch.dtype | None:
    """Take ``dtype`` out of ``options``, or ``torch_dtype``, its older name in transformers."""
    given = [options.pop(name) for name in ("dtype", "torch_dtype") if name in options]
    if len(given) == 2 and given[0] != given[1]:
        raise ValueError(f"{where}: give dtype or torch_dtype, not both")
    dtype = given[0] if given else None
    if isinstance(dtype, str) and dtype != "auto":
        name, dtype = dtype, getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{where}: dtype must be a torch.dtype or its name, got {name!r}")
    return dtype


def _read_config(path_or_name: str | Path, where: dict) -> tuple[str, dict]:
    path = Path(path_or_name)
    if path.exists() and not (path / where.get("subfolder", "") / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{path_or_name} has no {CONFIG_NAME}: not a model folder")
    try:
        keys, _ = PretrainedConfig.get_config_dict(path_or_name, **where)
    except OSError as error:
        raise FileNotFoundError(
            f"model {str(path_or_name)!r} is neither a local folder nor a hub name that can be reached"
        ) from error
    model_type = keys.get("model_type")
    if model_type not in MODELS:
        raise ValueError(
            f"{path_or_name}: model_type is {model_type!r}; supported are {', '.join(sorted(MODELS))}"
        )
    return model_type, keys
