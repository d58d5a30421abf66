"""What ``--help`` prints: the settings in groups, what they mean, what they may be, and the defaults that apply."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from refine.settings import kinds_of

_KINDS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


def print_help(
    cls: type,
    prog: str,
    about: str,
    shown: Mapping[str, Any] = types.MappingProxyType({}),
    examples: Sequence[tuple[str, str]] = (),
) -> None:
    """Print the help of a command.

    Args:
        cls: the settings class. Each class in its ``GROUPS`` is a group, under the first sentence of its docstring;
            what belongs to none of them stands first.
        prog, about: the command and what it does.
        shown: the defaults where no model is named, by name, where they are others.
        examples: (what for, command).
    """
    lines = [line for what, command in examples for line in (f"  # {what}", f"  {command}", "")]
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        usage=f"{prog} [--config FILE] [--NAME VALUE ...]",
        epilog="\n".join(["examples:", *lines]) if lines else None,
        formatter_class=_Formatter,
        add_help=False,
    )
    groups = getattr(cls, "GROUPS", {})
    own = {f.name: f for f in dataclasses.fields(cls)}
    grouped = {f.name for group in groups.values() for f in dataclasses.fields(group)}
    first = parser.add_argument_group("command")
    first.add_argument("--config", metavar="FILE", help=getattr(cls, "ABOUT_CONFIG", _CONFIG))
    first.add_argument("--help", action="store_true", help="show this and end")
    for name, field in own.items():
        if name not in grouped:
            _add(first, cls, field, shown)
    for title, group in groups.items():
        section = parser.add_argument_group(f"{title}: {_first_sentence(group)}")
        for f in dataclasses.fields(group):
            _add(section, cls, own[f.name], shown)
    parser.print_help()


_CONFIG = "a YAML file of settings; the command line goes over it"


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are wrapped, examples stay as they are."""
        if text.startswith("examples:"):
            return text
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _add(section: Any, cls: type, field: dataclasses.Field, shown: Mapping[str, Any]) -> None:
    names = [f"--{field.name}"]
    names += [f"--{other}" for other, name in getattr(cls, "ALIASES", {}).items() if name == field.name]
    text = field.metadata.get("help") or documented(cls).get(field.name, "")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    said = "default:" in text
    defaults = "" if said or default in (None, [], {}) else f"default: {_value(default)}"
    if field.name in shown and shown[field.name] != default:
        other = f"{_value(shown[field.name])} where no model is named"
        defaults = f"{defaults}; {other}" if defaults else f"default: {other}"
    text = f"{text} ({defaults})" if defaults else text
    section.add_argument(*names, metavar=_metavar(cls, field), help=text.replace("%", "%%"))


def _metavar(cls: type, field: dataclasses.Field) -> str:
    if choices := field.metadata.get("choices"):
        return "{" + ",".join(choices) + "}"
    kind = kinds_of(cls)[field.name]
    if isinstance(kind, types.UnionType):
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    origin = typing.get_origin(kind)
    if origin is dict:
        return "KEY=VALUE,..."
    if origin is list:
        item = _KINDS[typing.get_args(kind)[0]]
        return f"{item} ..."
    return _KINDS[kind]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_sentence(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split()).removesuffix(".")


def documented(cls: type) -> dict[str, str]:
    """name -> what the ``Attributes`` of the docstrings of a class and its bases say, in plain text."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, marker, text = inspect.cleandoc(base.__doc__ or "").partition("Attributes:\n")
        if not marker:
            continue
        for names, about in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", text, re.M):
            plain = (
                re.sub(r":\w+:`~?([^`]+)`", r"\1", " ".join(about.split()))
                .replace("``", "")
                .removesuffix(".")
            )
            found |= dict.fromkeys(names.split(", "), plain)
    return found
