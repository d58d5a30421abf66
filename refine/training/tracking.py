"""What a run leaves to look at: metrics.jsonl, TensorBoard and Weights & Biases.

None of it is worth a run: where it cannot be written, that is said once, and the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refine.files import why
from refine.settings import SettingsError


class Tracker:
    """Writes one line of ``metrics.jsonl`` at a time and passes it on to the reporters asked for.

    Args:
        output_dir: the run's folder.
        report_to: ``tensorboard`` and ``wandb``, any of them.
        run_name: shown by the reporters.
        settings: logged once with the reporters.
        step: lines after this step are dropped first, so that a resumed run has no line twice.
        closed: the run had come to its end at ``step``: its closing evaluation is made again, and dropped too.

    A line of the file that is none of ours is set aside in ``metrics.jsonl.broken``; no other is lost for it.
    """

    def __init__(
        self,
        output_dir: Path,
        report_to: list[str],
        run_name: str | None,
        settings: dict[str, Any],
        step: int,
        closed: bool = False,
    ):
        self.path = output_dir / "metrics.jsonl"
        self._waiting = b""  # what could not be written yet
        self._warned: set[str] = set()
        lines, broken = split_metrics(self.path)
        if broken:
            with self.path.with_name(f"{self.path.name}.broken").open("ab") as file:
                file.write(b"".join(text + b"\n" for text in broken))
            print(f"{len(broken)} broken lines of {self.path} are set aside in {self.path.name}.broken")
        kept = [
            json.dumps(line) + "\n"
            for line in lines
            if line["step"] < step
            or (line["step"] == step and not (closed and any(key.startswith("eval_") for key in line)))
        ]
        whole = self.path.with_name(self.path.name + ".partial")  # a crash here must not lose a line
        whole.write_text("".join(kept), encoding="utf-8")
        whole.replace(self.path)
        self._file = self.path.open("ab", buffering=0)
        self._tensorboard = self._wandb = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(output_dir / "tensorboard", purge_step=step + 1)
        if "wandb" in report_to:
            import wandb

            project = os.environ.get("WANDB_PROJECT", "refine")
            self._wandb = wandb.init(project=project, name=run_name, config=settings, dir=str(output_dir))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; a value that is not finite is written as null, so that every line is valid JSON. Where the
        disk is full the lines wait for the next call."""
        line = {"step": step} | {name: _plain(value) for name, value in metrics.items()}
        self._waiting += json.dumps(line).encode() + b"\n"
        self.attempt("metrics", self._write)
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float)}
        if self._tensorboard is not None:
            self.attempt("tensorboard", lambda: self._to_tensorboard(numbers, step))
        if self._wandb is not None:
            self.attempt("wandb", lambda: self._wandb.log(numbers, step=step))

    def attempt(self, what: str, write: Callable[[], Any]) -> Any:
        """Do something that is not worth the run: an error is said once, and None is returned."""
        try:
            return write()
        except Exception as error:
            if what not in self._warned:
                print(
                    f"{what}: not written ({why(error, self.path.parent)}); the run goes on", file=sys.stderr
                )
                self._warned.add(what)
            return None

    def close(self) -> None:
        """Flush and close everything."""
        self.attempt("metrics", self._write)
        self.attempt("metrics", self._file.close)
        if self._tensorboard is not None:
            self.attempt("tensorboard", self._tensorboard.close)
        if self._wandb is not None:
            self.attempt("wandb", self._wandb.finish)

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _to_tensorboard(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)


def check_reporters(report_to: list[str]) -> None:
    """Whether every reporter asked for is installed.

    Raises:
        SettingsError: one is not.
    """
    for name in report_to:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"report_to {name} needs its package: pip install {name}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, in order; what is none is left out."""
    return split_metrics(path)[0]


def first_evaluation(path: Path, like: dict[str, Any] | None) -> dict[str, Any] | None:
    """The evaluation that a run began with, of the same measures and as many sequences as ``like``; None: the file
    has none."""
    line = next((line for line in read_metrics(path) if "eval_sequences" in line), None)
    if line is None or not like or line["step"] != 0 or line["eval_sequences"] != like["eval_sequences"]:
        return None
    numbers = [name for name, value in like.items() if isinstance(value, int | float)]
    return line if all(isinstance(line.get(name), int | float) for name in numbers) else None


def split_metrics(path: Path) -> tuple[list[dict[str, Any]], list[bytes]]:
    """The lines of a metrics file, and what else stands in it; a last line that a crash has torn is neither."""
    if not path.is_file():
        return [], []
    lines: list[dict[str, Any]] = []
    broken: list[bytes] = []
    pieces = path.read_bytes().split(b"\n")
    for number, text in enumerate(pieces, 1):
        try:
            line = json.loads(text)
            if not isinstance(line["step"], int) or isinstance(line["step"], bool):
                raise ValueError
            lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            if text.strip() and number < len(pieces):
                broken.append(text)
    return lines, broken


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [_plain(one) for one in value] if isinstance(value, list) else value
