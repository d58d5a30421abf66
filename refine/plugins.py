"""What is chosen by name, or brought along as ``module:function``: rewards, selections, objectives, texts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping


def find_function(setting: str, name: str, known: Mapping[str, Callable]) -> Callable:
    """The function that a setting names.

    Args:
        setting: what the setting is called, for the message.
        name: a key of ``known``, or ``module:function``, which is imported.

    Raises:
        ValueError: there is no such name, the import fails, or what is there cannot be called.
    """
    if name in known:
        return known[name]
    module, colon, attribute = str(name).partition(":")
    if not (
        isinstance(name, str) and colon and attribute and all(x.isidentifier() for x in module.split("."))
    ):
        raise ValueError(f"{setting} must be one of {', '.join(known)} or module:function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs the module: whatever it raises is about this setting
        raise ValueError(f"{setting} {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(
            f"{setting} {name!r} must be a function, the module holds a {type(function).__name__}"
        )
    return function
