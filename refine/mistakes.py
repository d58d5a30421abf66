"""What a person may have meant: the nearest name, other tools' names, and words that stand where none belongs."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path

# What other tools call a setting; a text with a blank is said as it is.
SYNONYMS = {
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("per_device_eval_batch_size", "eval_batch_size", "per_device_batch_size"), "batch_size"),
    **dict.fromkeys(
        ("epochs", "num_epochs", "num_train_epochs", "max_epochs"),
        "the length of a run is counted in updates: 'max_steps'",
    ),
    **dict.fromkeys(("steps", "num_steps", "train_steps", "max_iters", "total_steps"), "max_steps"),
    **dict.fromkeys(("kl_coef", "kl_coeff", "kl_penalty"), "beta"),
    **dict.fromkeys(("epsilon", "clip_eps", "epsilon_low", "cliprange"), "clip_range"),
    **dict.fromkeys(("epsilon_high", "clip_ratio_high"), "clip_range_high"),
    "delta": "dual_clip",
    **dict.fromkeys(("num_generations", "group_size", "num_samples_per_prompt", "n"), "num_rollouts"),
    **dict.fromkeys(("max_completion_length", "max_new_tokens", "response_length", "k"), "rollout_length"),
    "c": "num_chunks",
    **dict.fromkeys(("num_iterations", "ppo_epochs", "num_ppo_epochs", "mu"), "num_mini_batches"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "seq_len", "block_size", "context_length"), "max_length"
    ),
    **dict.fromkeys(("model", "model_path", "model_name", "model_id", "pretrained"), "model_name_or_path"),
    **dict.fromkeys(("tokenizer", "tokenizer_name", "tokenizer_path"), "tokenizer_name_or_path"),
    **dict.fromkeys(
        ("dataset", "dataset_name", "dataset_path", "data", "train_file", "train_data"),
        "dataset_name_or_path",
    ),
    **dict.fromkeys(("warmup", "warmup_ratio", "num_warmup_steps"), "warmup_steps"),
    **dict.fromkeys(("lr_scheduler", "scheduler", "scheduler_type", "lr_schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("grad_clip", "clip_grad", "gradient_clipping", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("adam_eps", "eps", "optimizer_eps"), "adam_epsilon"),
    **dict.fromkeys(
        ("grad_accum", "accumulation_steps", "gradient_accumulation"), "gradient_accumulation_steps"
    ),
    **dict.fromkeys(("fp16", "dtype", "torch_dtype", "precision", "mixed_precision"), "bf16"),
    **dict.fromkeys(("output", "out_dir", "output_path", "save_dir", "logging_dir"), "output_dir"),
    **dict.fromkeys(("resume", "resume_from"), "resume_from_checkpoint"),
    "resume_from_checkpoint": "resume",
    **dict.fromkeys(("overwrite", "force"), "overwrite_output_dir"),
    **dict.fromkeys(("limit", "num_samples", "max_samples"), "samples"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "eval_steps"),
    "save_strategy": "save_steps",
    "logging_strategy": "logging_steps",
    **dict.fromkeys(("reward_funcs", "reward_fn", "reward_function", "reward_model"), "reward"),
    "loss_type": "objective",
    **dict.fromkeys(("random_seed", "data_seed"), "seed"),
    **dict.fromkeys(("task", "benchmark", "benchmarks"), "tasks"),
}


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """The end of a sentence about an unknown name: what it may have meant."""
    known = list(known)
    synonym = SYNONYMS.get(name.lower(), "")
    if " " in synonym:
        target = synonym.rpartition(" ")[2].strip("'")
        if target in known:
            return f": {synonym}"
    elif synonym in known:
        return f": did you mean {synonym!r}?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f": did you mean {near[0]!r}?"
    return f"; there are {', '.join(known)}" if otherwise is None else otherwise


def meant_by_word(word: str, names: Collection[str], before: str | None = None) -> str:
    """The sentence about a word of a command line that belongs to no setting.

    Args:
        word: as it was given.
        names: of the settings.
        before: the setting whose one value stands before the word.
    """
    bare = word.strip("-\N{EN DASH}\N{EM DASH}")
    name, equals, value = bare.partition("=")
    name = name.replace("-", "_")
    if word != bare and bare:
        what = f"{word!r}: settings begin with two dashes"
        return what + (
            f": --{name}{equals}{value}" if name in names else nearest(name, names, "; --help lists all")
        )
    what = f"unknown setting {word!r}: a value stands after its --name; "
    if bare in ("help", "h"):
        return f"{word!r}: the list of settings is --help"
    if name in names:
        return f"{word!r}: settings begin with two dashes: --{name}{equals}{value}"
    if option := _option_of_path(Path(word).expanduser(), names):
        return f"{what}did you mean --{option} {word}?"
    if before is not None:
        return f"{before} takes one value, and {word!r} is another; more settings are written --NAME VALUE"
    if equals:
        return f"{word!r}: settings are written --NAME VALUE{nearest(name, names, '; --help lists all')}"
    return f"{what}a file of settings is --config FILE, a model is --model_name_or_path FOLDER"


def _option_of_path(path: Path, names: Collection[str]) -> str | None:
    """The setting that a file or folder belongs to, by what it is."""
    try:
        model = (path / "config.json").is_file()
        there = path.exists()
    except OSError:
        return None
    if path.suffix in (".yaml", ".yml"):
        return "config"
    if model and "model_name_or_path" in names:
        return "model_name_or_path"
    return "dataset_name_or_path" if there and "dataset_name_or_path" in names else None
