"""One reader of settings for every command: flags over a YAML file over defaults, into a dataclass.

A settings class is a dataclass whose fields are made with :func:`setting`. It may name ``GROUPS`` (a YAML file may
write the fields of a group under the group's name) and ``ALIASES`` (other names of a setting). Whatever a user
wrote and nothing reads is an error that names the nearest setting, also under the names of TRL and transformers.
Nothing is known here of what a setting means.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

LARGEST_FILE = 100_000  # values in a YAML file, with what its aliases stand for written out
IMPORTED = ("reward", "selection", "objective", "reward_funcs")  # settings that may be module:function

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


class SettingsError(ValueError):
    """A setting that cannot be: the message names it, what was given and what is allowed."""


def setting(
    default: Any,
    help: str = "",
    *,
    least: float | None = None,
    over: float | None = None,
    under: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    commas: bool = True,
) -> Any:
    """A dataclass field: its default, one line of help, and what it may be (each item of a list likewise; a text
    with commas is several items, unless ``commas`` says otherwise)."""
    about = {"help": help, "least": least, "over": over, "under": under, "most": most, "choices": choices}
    about["commas"] = commas
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=default.copy, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def check_values(settings: Any) -> None:
    """Whether every field is what :func:`setting` says it may be, and every number finite.

    Raises:
        SettingsError: the first that is not.
    """
    for f in dataclasses.fields(settings):
        value, about = getattr(settings, f.name), f.metadata
        items = value if isinstance(value, list) else [value]
        each = " each" if isinstance(value, list) else ""
        if value is None:
            continue
        if choices := about.get("choices"):
            for item in items:
                if item not in choices:
                    must = "takes" if each else "must be one of"
                    raise SettingsError(f"{f.name} {must} {', '.join(choices)}, got {short(item)}")
        for item in items:
            if not isinstance(item, int | float) or isinstance(item, bool):
                continue
            tests = (
                ("at least", about.get("least"), lambda x, y: x >= y),
                ("over", about.get("over"), lambda x, y: x > y),
                ("under", about.get("under"), lambda x, y: x < y),
                ("at most", about.get("most"), lambda x, y: x <= y),
            )
            known = [(text, bound, right) for text, bound, right in tests if bound is not None]
            if not all(right(item, bound) for _, bound, right in known) or not math.isfinite(item):
                allowed = [f"{text} {bound}" for text, bound, _ in known]
                allowed += [] if isinstance(item, int) else ["finite"]
                raise SettingsError(f"{f.name} must be {' and '.join(allowed)}{each}, got {short(value)}")


def read_command_line(
    cls: type,
    arguments: list[str],
    prog: str,
    about: str,
    shown: Mapping[str, Any] = types.MappingProxyType({}),
    words_are: str | None = None,
) -> dict[str, Any]:
    """What flags say, by the names of ``cls``, converted; ``config`` too where it is given.

    Args:
        cls: the settings class.
        arguments: of the command.
        prog, about: for ``--help``.
        shown: other defaults to show in ``--help``, by name.
        words_are: the setting, a list, that words without a flag belong to; None: they are refused.

    Raises:
        SettingsError: an unknown flag, a value of the wrong kind or none, something that is no flag.
        SystemExit: ``--help``.
    """
    kinds = kinds_of(cls) | {"config": str}
    aliases = getattr(cls, "ALIASES", {})
    as_they_are = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("commas", True)}
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            _print_help(cls, prog, about, shown)
            raise SystemExit(0)
        if words_are is not None and not word.startswith("-"):
            found[words_are] = [*found.get(words_are, []), word]
            continue
        if not word.startswith("--") or word == "--":
            _refuse_word(word, cls)
        given, equals, value = word[2:].partition("=")
        name = given.replace("-", "_")
        name = name if name in kinds else aliases.get(name, name)
        if name not in kinds:
            refuse_name(given, cls)
        if equals:
            found[name] = convert(kinds[name], name, value)
            continue
        words = []
        while rest and not rest[0].startswith("--") and (not rest[0].startswith("-") or _is_number(rest[0])):
            if words and _origin(kinds[name]) is not list:
                break
            words.append(rest.pop(0))
        if not words and kinds[name] is not bool and _origin(kinds[name]) is not list:
            raise SettingsError(f"{name} needs a value: --{name} VALUE")
        if name in as_they_are:
            found[name] = words
        elif _origin(kinds[name]) is list:
            found[name] = convert(kinds[name], name, words)
        else:
            found[name] = convert(kinds[name], name, words[0] if words else True)
    return found


def read_yaml(path: Any, what: str = "config") -> Any:
    """What a YAML file holds, read safely; None: nothing.

    Raises:
        SettingsError: it cannot be read, is not YAML, has a key twice, or is far too large.
    """
    try:
        loader = _Loader(Path(str(path)).expanduser().read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        if _written_out(node, {}) > LARGEST_FILE:
            raise SettingsError(f"{what} {str(path)!r} has more than {LARGEST_FILE:,} values")
        return loader.construct_document(node)
    except SettingsError as error:
        raise SettingsError(str(error).replace(_HERE, f"{what} {str(path)!r}")) from error
    except OSError as error:
        raise SettingsError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise SettingsError(f"{what} {str(path)!r} is nested too deeply, or contains itself") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise SettingsError(f"{what} {str(path)!r} is not YAML: {text[:300]}") from error


def read_file(cls: type, path: Any, what: str = "config") -> dict[str, Any]:
    """The settings in a YAML file, checked by name and kind; groups are taken apart.

    Raises:
        SettingsError: see :func:`read_yaml`; an unknown name, or a value of the wrong kind.
    """
    loaded = read_yaml(path, what)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"{what} {str(path)!r} must be a mapping of settings, got {type(loaded).__name__}"
        )
    return read_mapping(cls, loaded)


def read_mapping(cls: type, mapping: Mapping[Any, Any]) -> dict[str, Any]:
    """The settings in a mapping, checked by name and kind; groups are taken apart."""
    kinds, aliases, groups = kinds_of(cls), getattr(cls, "ALIASES", {}), getattr(cls, "GROUPS", {})
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if name in found:
            raise SettingsError(f"{name} is given twice")
        found[name] = convert(kinds[name], name, value)

    for given, value in mapping.items():
        if given in groups and isinstance(value, dict):
            members = [f.name for f in dataclasses.fields(groups[given])]
            for name, own in value.items():
                if name not in members:
                    raise SettingsError(
                        f"group {given}: unknown setting {short(name)}{nearest(str(name), members)}"
                    )
                add(name, own)
            continue
        name = given if given in kinds else aliases.get(given, given)
        if name not in kinds:
            refuse_name(str(given), cls)
        add(name, value)
    return found


def build(cls: type, values: dict[str, Any]) -> Any:
    """The settings themselves. Code that a value names (``module:function``) is said before it is imported.

    Raises:
        SettingsError: values that cannot be.
    """
    for name in IMPORTED:
        given = values.get(name)
        for value in given if isinstance(given, list) else [given]:
            if not isinstance(value, str) or ":" not in value:
                continue
            if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", value):
                raise SettingsError(f"{name} must be a name or module:function, got {short(value)}")
            print(
                f"{name} {value}: importing {value.partition(':')[0]}, code from outside this package",
                file=sys.stderr,
            )
    try:
        return cls(**values)
    except ValueError as error:
        raise error if isinstance(error, SettingsError) else SettingsError(str(error)) from error


def to_yaml(settings: Any) -> str:
    """The settings as resolved, in the order of their definition; :func:`read_file` reads them back."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False, allow_unicode=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (before, now) of the settings that both have and that differ."""
    return {name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]}


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


def refuse_name(name: str, cls: type) -> NoReturn:
    """Say that there is no setting of that name, and which is meant."""
    known = [*kinds_of(cls), "config", *getattr(cls, "ALIASES", {})]
    raise SettingsError(f"unknown setting {name!r}{nearest(name, known, '; --help lists all')}")


def kinds_of(cls: type) -> dict[str, Any]:
    """name -> type of every field."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def short(value: Any) -> str:
    """A value as it is shown in a sentence."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:110]}..."


def convert(kind: Any, name: str, value: Any) -> Any:
    """A value from YAML or a flag as the kind that the setting has.

    Raises:
        SettingsError: it is none of that kind.
    """
    if isinstance(kind, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        kind = _bare(kind)
    origin = typing.get_origin(kind)
    try:
        if origin is list:
            (item_kind,) = typing.get_args(kind)
            items = [] if value is None else value if isinstance(value, list) else [value]
            if not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
                raise ValueError
            parts = [part.strip() for item in items for part in str(item).split(",")]
            return [_scalar(item_kind, part) for part in parts if part and part != "none"]
        if origin is dict:
            return _mapping(value)
        return _scalar(kind, value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError):
        item = typing.get_args(kind)[0] if origin is list else kind
        one = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        wanted = "key=value,key=value" if origin is dict else one[item] + (" each" if origin is list else "")
        if kind == list[str]:
            wanted = "a list of names"
        raise SettingsError(f"{name} must be {wanted}, got {short(value)}") from None


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
            return value.lower() in ("true", "yes", "on", "1")
        raise ValueError
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError
    if kind is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return kind(value)


def _mapping(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError
    pairs = [pair.split("=", 1) for pair in value.split(",") if pair]
    found = {key.strip(): yaml.safe_load(text) for key, text in pairs}
    if len(found) < len(pairs):
        raise ValueError
    return found


def _bare(kind: Any) -> Any:
    """A type without its ``| None``."""
    if isinstance(kind, types.UnionType):
        return next(option for option in typing.get_args(kind) if option is not type(None))
    return kind


def _origin(kind: Any) -> Any:
    return typing.get_origin(_bare(kind))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _refuse_word(word: str, cls: type) -> NoReturn:
    known = [*kinds_of(cls), "config"]
    if word.startswith("-") and word.strip("-"):
        name = word.strip("-").partition("=")[0].replace("-", "_")
        hint = f"--{name}" if name in known else None
        near = nearest(name, known, "; --help lists all")
        raise SettingsError(f"{word!r}: settings begin with two dashes" + (f": {hint}" if hint else near))
    uses = ["a file of settings is --config FILE", "a model is --model_name_or_path FOLDER"]
    raise SettingsError(f"unknown setting {word!r}: a value stands after its --name; {', '.join(uses)}")


def _print_help(cls: type, prog: str, about: str, shown: Mapping[str, Any]) -> None:
    parser = argparse.ArgumentParser(
        prog=prog, description=about, usage=f"{prog} [--config FILE] [--NAME VALUE ...]"
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of these settings")
    for f in dataclasses.fields(cls):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        other = f"; without --config and --model_name_or_path: {shown[f.name]}" if f.name in shown else ""
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata.get("choices") else ""
        text = (f.metadata.get("help") or "see refine.RefineConfig") + choices
        text = f"{text} (default: {default}{other})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", metavar="VALUE", help=text)
    parser.print_help()


_HERE = "\0the file"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that stands twice in a mapping."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise SettingsError(
                        f"{_HERE} has {key.value!r} twice, in lines {seen[key.value]} and {line}"
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep)


def _written_out(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for when aliases are written out; RecursionError if it contains itself."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise RecursionError
        return known[id(node)]
    known[id(node)] = 0
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_written_out(item, known) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_written_out(key, known) + _written_out(value, known) for key, value in node.value)
    known[id(node)] = size
    return size
