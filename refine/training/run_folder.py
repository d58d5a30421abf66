"""A run's folder: whose it is, what of it may be replaced, and which checkpoints stay.

The file ``.refine-run.json`` marks a folder as a run of ours and lists the checkpoints in the order in which they
were written. Without it nothing in a folder is overwritten; with it, only files of the names that a run writes.
"""

from __future__ import annotations

import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from refine.files import LOCK, FolderInUse, owned, write_whole
from refine.settings import SettingsError
from refine.training import checkpoint

MARK = ".refine-run.json"
_FILES = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "metrics.jsonl.broken",
    "loss.png",
    "reward.png",
    "held_out_reward.png",
    "report.html",
)
_INSIDE = {
    "samples": re.compile(r"step-\d+\.txt|(step|held-out)-\d+\.json"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
}


class RunFolder:
    """The folder of one run, before and while it is worked in.

    Args:
        path: of the folder, which need not be there.

    Attributes:
        begun: this process writes in it.
        last_saved: the checkpoint that this process wrote last, or began from.
    """

    def __init__(self, path: Path):
        self.path = path
        self.begun = False
        self.last_saved: Path | None = None
        self._owned: ExitStack | None = None
        self._written: list[str] | None = None  # checkpoints, the oldest first; None: the folder has no mark
        self._keep_always: str | None = None

    def look(self, wanted: str, overwrite: bool) -> tuple[Path, dict[str, Any]] | None:
        """What to resume, if anything; whether a run may be made here. Nothing is changed.

        Args:
            wanted: ``resume_from_checkpoint``.
            overwrite: ``overwrite_output_dir``.

        Raises:
            SettingsError: the folder holds what a run would have to overwrite.
            CheckpointError: see :func:`refine.training.checkpoint.find_resume`.
        """
        path = self.path
        if path.is_symlink() and not path.exists():
            raise SettingsError(f"output_dir {str(path)!r} is a link to nothing")
        if path.exists() and not path.is_dir():
            raise SettingsError(f"output_dir {str(path)!r} is a file")
        if not path.exists():
            return checkpoint.find_resume(path, wanted)
        names = {entry.name for entry in path.iterdir()} - {LOCK, MARK, f"{MARK}.partial"}
        self._read_mark()
        if self._written is not None:
            self._own()
        found = checkpoint.find_resume(path, wanted)
        final = path / "final"
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise SettingsError(
                f"{final} is a link or a file: the model would be written there; move it away"
            )
        if final.is_dir() and not checkpoint.holds_only_ours(final) and (found or self._written is not None):
            raise SettingsError(f"{final} holds files that no run writes: move them, or take another folder")
        again = wanted == "auto" and self._written is not None
        if found is None and names and not (again or overwrite):
            raise SettingsError(
                f"output_dir {str(path)!r} is not empty: give --overwrite_output_dir, "
                "--resume_from_checkpoint auto, or another folder"
            )
        if found is None and self._written is None and (ours := sorted(filter(_is_ours, names))):
            raise SettingsError(
                f"output_dir {str(path)!r} holds {', '.join(ours[:4])}, but no {MARK} that says that a run wrote "
                "them: nothing is overwritten. Move them away, or take another folder"
            )
        return found

    def begin(self, resumed: Path | None, step: int, by_name: bool) -> None:
        """Make the folder this run's: owned, marked, without what an earlier run left behind.

        Args:
            resumed: the checkpoint to go on from; None: begin anew.
            step: the update after which it was written.
            by_name: it was named by the user, and so stays whatever is written after it.

        Raises:
            SettingsError: another process works in it, or made it meanwhile.
            OSError: it cannot be written.
        """
        was_there = self._written is not None
        self.path.mkdir(parents=True, exist_ok=True)
        self._own()
        if not was_there and (self.path / MARK).is_file() and resumed is None:
            raise SettingsError(f"output_dir {str(self.path)!r}: another run was made in it meanwhile")
        self.begun, self.last_saved = True, resumed
        inside = resumed is not None and resumed.resolve().parent == self.path.resolve()
        if resumed is None:
            self._clear()
            self._written = []
        else:
            if self._written is None:
                self._written = [folder.name for folder in checkpoint.list_checkpoints(self.path)]
            self._set_aside(step, resumed if inside else None)
            self._keep_always = resumed.name if inside and by_name else None
        self._write_mark()
        checkpoint.clear_partial(self.path)

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of an update goes."""
        return self.path / f"checkpoint-{step}"

    def about_to_write(self, folder: Path) -> None:
        """Note a checkpoint as this run's; before it is there, so that no kill can come between."""
        self._written = [name for name in self._written or [] if name != folder.name] + [folder.name]
        self._write_mark()

    def rotate(self, keep: int | None) -> None:
        """Remove the oldest beyond ``keep`` of the checkpoints that this run wrote, but not the one that the user
        resumed by name. None removes nothing."""
        there = [
            name for name in self._written or [] if (self.path / name / checkpoint.TRAINING_STATE).is_file()
        ]
        for name in there[:-keep] if keep is not None else []:
            if name != self._keep_always:
                checkpoint.remove_folder(self.path / name)
                there.remove(name)
        self._written = there
        self._write_mark()

    def whole_checkpoints(self) -> str:
        """What is there to go on from, for the end of a sentence."""
        names = [folder.name for folder in checkpoint.list_checkpoints(self.path)]
        return (
            f"written before: {', '.join(names)} in {self.path}"
            if names
            else "no checkpoint was written before"
        )

    def close(self) -> None:
        """Let others work in the folder."""
        if self._owned is not None:
            self._owned.close()

    def _own(self) -> None:
        if self._owned is not None:
            return
        stack = ExitStack()
        try:
            stack.enter_context(owned(self.path))
        except FolderInUse as error:
            raise SettingsError(f"output_dir {error}") from error
        self._owned = stack

    def _read_mark(self) -> None:
        path = self.path / MARK
        if not path.is_file():
            return
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
            self._written = [name for name in names if isinstance(name, str)]
        except (ValueError, KeyError, TypeError):
            self._written = [folder.name for folder in checkpoint.list_checkpoints(self.path)]

    def _write_mark(self) -> None:
        about = {"made_by": "refine.train", "checkpoints": self._written}
        write_whole(self.path / MARK, json.dumps(about) + "\n")

    def _clear(self) -> None:
        """Remove what an earlier run of ours wrote, file by file, and nothing else."""
        if self._written is None:
            return
        for folder in checkpoint.list_checkpoints(self.path):
            if (folder / checkpoint.TRAINING_STATE).is_file():
                checkpoint.remove_folder(folder)
        checkpoint.remove_folder(self.path / "final")
        for name, pattern in _INSIDE.items():
            folder = self.path / name
            if folder.is_dir() and not folder.is_symlink():
                for path in folder.iterdir():
                    if pattern.fullmatch(path.name) and path.is_file():
                        path.unlink()
                if not any(folder.iterdir()):
                    folder.rmdir()
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def _set_aside(self, step: int, resumed: Path | None) -> None:
        """Going back to an earlier checkpoint: those after it move to a folder of their own, with the metrics."""
        keep = None if resumed is None else resumed.name
        newer = [
            folder
            for folder in checkpoint.list_checkpoints(self.path)
            if checkpoint.step_of(folder) >= step and folder.name != keep
        ]
        if not newer:
            return
        number = 1
        while (aside := self.path / f"aside-{number}").exists():
            number += 1
        aside.mkdir()
        if (self.path / "metrics.jsonl").is_file():
            shutil.copy2(self.path / "metrics.jsonl", aside)
        for folder in newer:
            folder.rename(aside / folder.name)
        final = self.path / "final"
        if final.is_dir() and not final.is_symlink():
            final.rename(aside / "final")
        self._written = [name for name in self._written or [] if (self.path / name).exists()]
        print(f"later checkpoints are moved to {aside}: {', '.join(folder.name for folder in newer)}")


def _is_ours(name: str) -> bool:
    """Whether a run would write something of this name."""
    return name in (*_FILES, *_INSIDE, "final") or re.fullmatch(r"checkpoint-\d+", name) is not None
