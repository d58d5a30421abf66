"""Files that outlive a crash: written whole or not at all, owned by one process, and failures told in words."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: nothing is locked
    fcntl = None

LOCK = ".refine.lock"
_WORDS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file may not grow that large here (ulimit -f)",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
}


class FolderInUse(RuntimeError):
    """Another process works in the folder: the message says which."""


def why(error: BaseException, folder: Path | None = None) -> str:
    """What went wrong with a file, in words.

    Args:
        error: an OSError, or what torch and safetensors make of one.
        folder: where it was written, to see whether its disk is full.
    """
    text = next(iter(str(error).splitlines()), type(error).__name__)
    number = getattr(error, "errno", None)
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        if f"os error {code})" in text:
            number = code
    named = f": {error.filename}" if getattr(error, "filename", None) else ""
    if number in _WORDS:
        return _WORDS[number] + named
    if "inline_container" in text or "PytorchStreamWriter" in text:  # torch.save, whose file stopped growing
        full = folder is not None and folder.exists() and shutil.disk_usage(folder).free < 1 << 20
        return "the disk is full" if full else f"a write was cut short ({text[:80]})"
    return error.strerror + named if getattr(error, "strerror", None) else text


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place, and rename it when it is complete and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder for this process alone, until the end of the block or of the process, however that ends.

    Raises:
        FolderInUse: another process owns it; its id and host are named.
    """
    if fcntl is None:
        yield
        return
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise FolderInUse(
                f"{str(folder)!r} is in use by {owner}: wait for it, or take another folder"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{folder} cannot be locked ({why(error)}): start no second process in it", file=sys.stderr)
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
