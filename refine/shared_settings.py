"""The settings that training and evaluation share. What is made of them stands in :mod:`refine.prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refine.settings import setting


@dataclass(kw_only=True)
class ModelSettings:
    """Which model, and where it runs."""

    model_name_or_path: str | None = setting(
        None, "a folder or a hub name; none: the tiny model of this package"
    )
    tokenizer_name_or_path: str | None = setting(None, "default: the model's own")
    bf16: bool = setting(False, "autocast to bfloat16; parameters stay float32")
    device: str | None = setting(None, "cpu, cuda, cuda:1; default: a GPU if any")
    seed: int = setting(0, "of every draw", least=0, most=2**63 - 1)


@dataclass(kw_only=True)
class NewModelSettings:
    """A model that begins from random weights."""

    model_type: str | None = setting(None, "start from random weights of this type instead of a checkpoint")
    config_overrides: dict[str, Any] = setting({}, "model configuration, as key=value,key=value")
    mimetic_init: bool = setting(False, "begin a new model near in-context recall (arXiv 2410.11135)")


@dataclass(kw_only=True)
class TextSettings:
    """What text to read."""

    dataset_name_or_path: str | None = setting(
        None,
        "a .txt, .md, .jsonl, .json, .csv or .parquet file (also .gz or .zst), a folder of them, a hub name, or "
        "default (the text of every Python installation), recall, needles (generated documents of recall), "
        "default+recall, default+needles",
    )
    dataset_config: str | None = setting(None, "the configuration of a hub dataset")
    dataset_split: str = setting("train", "the split of a hub dataset")
    text_column: str | None = setting(
        None, "of a table; default: text, else the column with the longest text"
    )


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW; the defaults are the paper's."""

    learning_rate: float = setting(1e-6, "peak rate", over=0, most=1e30)
    adam_beta1: float = setting(0.9, "of the mean of gradients", least=0, under=1)
    adam_beta2: float = setting(0.999, "of the mean of their squares", least=0, under=1)
    adam_epsilon: float = setting(1e-8, "added to the root of that", least=1e-37)
    weight_decay: float = setting(0.01, "of matrices; vectors are not decayed", least=0)
    max_grad_norm: float = setting(0.2, "gradients are clipped to this norm", over=0)
