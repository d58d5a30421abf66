"""predictions.jsonl: a line an answer, appended batch by batch, so that a killed evaluation can go on.

A batch is one write, and a last line that a crash has torn is cut off before going on. Beside it lies
evaluation.json with the settings and the model's fingerprint: what must be the same for answers to belong
together.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine.files import FolderInUse, owned, why, write_whole

FILE = "predictions.jsonl"
IDENTITY = "evaluation.json"
RESULTS = "results.json"
_NEEDED = (
    "key",
    "task",
    "length",
    "score",
    "cut",
    "trained",
    "prompt_tokens",
    "prediction",
    "references",
    "depths",
)


class PredictionsError(ValueError):
    """Predictions that cannot be begun or gone on with: the message says why."""


class Predictions:
    """The answers of one evaluation, in memory and, with a folder, on disk.

    Args:
        folder: where the files go; None: nowhere.
        identity: JSON values by name; going on needs the same.
        resume: go on with what is there; where nothing is, begin.
        overwrite: begin anew whatever is there.

    Attributes:
        lines: key -> line of every answer so far.

    Raises:
        PredictionsError: the folder has predictions and neither is set, they are of another evaluation, or a
            line other than the last is broken.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: dict[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ):
        self.lines: dict[str, dict[str, Any]] = {}
        self._file, self._owned = None, ExitStack()
        if folder is None:
            return
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._owned.enter_context(owned(folder))
            if resume and path.exists():
                _check_identity(folder, identity)
                self.lines = _read(path)
            else:
                path.unlink(missing_ok=True)
                write_whole(folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
            self._file = path.open("ab", buffering=0)
        except (OSError, FolderInUse) as error:
            self._owned.close()
            reason = f"cannot be written: {why(error)}" if isinstance(error, OSError) else str(error)
            raise PredictionsError(f"output_dir {str(folder)!r} {reason}") from error

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Answers of one batch, in one write."""
        for line in lines:
            self.lines[line["key"]] = line
        if self._file is not None and lines:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            data = text.encode("utf-8", errors="replace")
            try:
                while data:
                    data = data[self._file.write(data) :]
                os.fsync(self._file.fileno())
            except OSError as error:
                raise PredictionsError(
                    f"{FILE} cannot be written: {why(error)}; the answers in it stay, go on with --resume"
                ) from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._owned.close()


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Whether an evaluation may write into a folder.

    Raises:
        PredictionsError: it holds an evaluation, or a results.json, and neither was asked for.
    """
    if folder.exists() and not folder.is_dir():
        raise PredictionsError(f"output_dir {str(folder)!r} is a file")
    if (folder / FILE).exists() and not (resume or overwrite):
        raise PredictionsError(
            f"output_dir {str(folder)!r} has the predictions of an earlier evaluation: give --resume, "
            "--overwrite_output_dir, or another folder"
        )
    if (folder / RESULTS).exists() and not (overwrite or _is_ours(folder / RESULTS)):
        raise PredictionsError(
            f"output_dir {str(folder)!r} has a {RESULTS} that no evaluation of ours wrote: give "
            "--overwrite_output_dir, or another folder"
        )


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of up to 1,024 values of every parameter: tells one model's weights from another's."""
    found = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        values = values[:: max(1, len(values) // 1024)]
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(values.float().cpu().numpy().astype(np.float32).tobytes())
    return found.hexdigest()


def _is_ours(results: Path) -> bool:
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"results", "settings", "versions"} <= found.keys()


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    try:
        before = dict(json.loads((folder / IDENTITY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PredictionsError(
            f"resume: {folder} has predictions but no readable {IDENTITY} that says how they were made"
        ) from error
    for name, now in json.loads(json.dumps(identity)).items():
        then = before.get(name)
        if then != now:
            raise PredictionsError(
                f"resume: {name} is {now!r}, but the predictions in {folder} were made with {then!r}"
            )


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Every line by its key; a last one that is torn is cut off the file."""
    lines, good = {}, 0
    data = path.read_bytes()
    pieces = data.split(b"\n")
    for number, piece in enumerate(pieces, 1):
        torn = number >= len(pieces) - 1  # the last line, or what follows its line break
        try:
            line = json.loads(piece)
            if number == len(pieces):  # whole, but for its line break: who knows
                raise ValueError
            if missing := [name for name in _NEEDED if name not in line]:
                raise ValueError(f"it has no {missing[0]}")
            lines[line["key"]] = line
        except (ValueError, KeyError, TypeError) as error:
            if not torn:
                raise PredictionsError(f"resume: line {number} of {path} is broken") from error
            break
        good += len(piece) + 1
    if good < len(data):
        with path.open("r+b") as file:
            file.truncate(good)
    return lines
