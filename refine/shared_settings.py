"""The settings that training and evaluation share. What is made of them stands in :mod:`refine.prepare`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from refine.settings import SettingsError, setting

ALL_LINEAR = "all-linear"  # PEFT's name for every linear map but the head


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
class AdapterSettings:
    """LoRA adapters (arXiv 2106.09685) by PEFT; the names are TRL's."""

    use_peft: bool = setting(False, "train LoRA adapters alone, and save them in PEFT's layout")
    lora_r: int = setting(16, "rank of the adapters", least=1)
    lora_alpha: float = setting(32.0, "the adapters' output is scaled by lora_alpha / lora_r", over=0)
    lora_dropout: float = setting(0.0, "on the adapters' input", least=0, under=1)
    lora_target_modules: list[str] = setting(
        [ALL_LINEAR], "names of linear maps, as q_proj,o_proj; all-linear: all but the head"
    )
    lora_modules_to_save: list[str] = setting([], "modules that are trained and saved whole")

    def check_adapters(self) -> None:
        """Whether they fit the other settings.

        Raises:
            SettingsError: they do not.
        """
        unused = AdapterSettings()
        changed = [name for name, value in vars(unused).items() if getattr(self, name) != value]
        if changed and not self.use_peft:
            raise SettingsError(f"{changed[0]} is about LoRA adapters: it needs use_peft")
        if self.use_peft and getattr(self, "model_type", None):
            raise SettingsError(
                "use_peft trains adapters of a model that is there: give model_name_or_path, not model_type"
            )
        if ALL_LINEAR in self.lora_target_modules and len(self.lora_target_modules) > 1:
            raise SettingsError(f"lora_target_modules: {ALL_LINEAR} goes without other names")


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
    add_bos_token: bool | None = setting(
        None, "texts and prompts begin with the tokens that the tokenizer puts there; default: they do"
    )


@dataclass(kw_only=True)
class OptimizerSettings:
    """AdamW; the defaults are the paper's."""

    learning_rate: float = setting(1e-6, "peak rate", over=0, most=1e30)
    adam_beta1: float = setting(0.9, "of the mean of gradients", least=0, under=1)
    adam_beta2: float = setting(0.999, "of the mean of their squares", least=0, under=1)
    adam_epsilon: float = setting(1e-8, "added to the root of that", least=1e-37)
    weight_decay: float = setting(0.01, "of matrices", least=0)
    decay_vectors: bool | None = setting(None, "of norms and decay rates too; default: they are not decayed")
    max_grad_norm: float = setting(0.2, "gradients are clipped to this norm", over=0)
