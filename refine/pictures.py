"""matplotlib that draws into files, whatever the environment asks for."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any


def import_matplotlib() -> Any:
    """``matplotlib`` that draws into files.

    Raises:
        ImportError: it is not installed.
    """
    with _variable("MPLBACKEND", "agg"):
        import matplotlib

        return matplotlib


def import_pyplot() -> Any:
    """``matplotlib.pyplot`` likewise.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _variable("MPLBACKEND", "agg"):
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot

        return matplotlib.pyplot


@contextmanager
def _variable(name: str, value: str):
    """An environment variable for a moment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
