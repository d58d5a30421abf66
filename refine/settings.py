"""One reader of settings for every command: flags over a YAML file over defaults, into a dataclass.

A settings class is a dataclass whose fields are made with :func:`setting`. It may name ``GROUPS`` (a YAML file may
write the fields of a group under the group's name) and ``ALIASES`` (other names of a setting). Whatever a user
wrote and nothing reads is an error that names the nearest setting, also under the names of TRL and transformers.
Nothing is known here of what a setting means.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from refine.mistakes import meant_by_word, nearest

LARGEST_FILE = 100_000  # values in a YAML file, with what its aliases stand for written out
IMPORTED = ("reward", "selection", "objective", "reward_funcs")  # settings that may be module:function


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
            if isinstance(item, str) and not item.strip():
                raise SettingsError(f"{f.name} is empty: give a value, or leave it out")
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
    examples: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """What flags say, by the names of ``cls``, converted; ``config`` too where it is given.

    Args:
        cls: the settings class.
        arguments: of the command.
        prog, about: for ``--help``.
        shown: other defaults to show in ``--help``, by name: those without a model.
        words_are: the setting, a list, that words without a flag belong to; None: they are refused.
        examples: (what for, command) of ``--help``.

    Raises:
        SettingsError: an unknown flag, a value of the wrong kind or none, something that is no flag.
        SystemExit: ``--help``.
    """
    kinds = kinds_of(cls) | {"config": str}
    aliases = getattr(cls, "ALIASES", {})
    as_they_are = {f.name for f in dataclasses.fields(cls) if not f.metadata.get("commas", True)}
    found: dict[str, Any] = {}
    rest = list(arguments)
    before: str | None = None  # the setting that the last value went to
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            from refine.option_help import print_help

            print_help(cls, prog, about, shown, examples)
            raise SystemExit(0)
        if words_are is not None and not word.startswith("-"):
            found[words_are] = [*found.get(words_are, []), word]
            continue
        if not word.startswith("--") or word == "--":
            raise SettingsError(meant_by_word(word, [*kinds, *aliases], before))
        given, equals, value = word[2:].partition("=")
        name = given.replace("-", "_")
        name = name if name in kinds else aliases.get(name, name)
        if name not in kinds:
            refuse_name(given, cls)
        before = None
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
        before = name if words else None
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


def refuse_name(name: str, cls: type) -> NoReturn:
    """Say that there is no setting of that name, and which is meant."""
    kinds = kinds_of(cls)
    known = [*kinds, "config", *getattr(cls, "ALIASES", {})]
    positive = name.removeprefix("no").lstrip("_-").replace("-", "_")
    if name.startswith("no") and kinds.get(positive) is bool:
        raise SettingsError(f"unknown setting {name!r}: to turn it off, --{positive} false")
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
    if kind is int and isinstance(value, str) and "e" in value.lower():
        value = float(value)  # 1e3
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
