"""How are secrets kept on disk? For their owner alone; a folder or file that others can read is refused."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


class StateError(Exception):
    """What is kept on disk can't be used. The message names the file and says why."""


def private_folder(folder: Path) -> None:
    """Makes it (0700), or looks whether it is for its owner alone. Raises StateError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(f"{folder}: {error.strerror}") from None
    _refuse_wider(folder, 0o077)


def read_private(file: Path) -> bytes | None:
    """None when there is no such file. Raises StateError, also for one that others can read."""
    try:
        _refuse_wider(file, 0o077)
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"{file}: {error.strerror}") from None


def write_private(file: Path, content: bytes) -> None:
    """Replaced whole, with 0600, and on the disk when this returns. Raises StateError."""
    try:
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")  # 0600 from the start
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StateError(f"{file}: {error.strerror}") from None


def refuse_writable(file: Path) -> None:
    """A file that says who may do what is its owner's alone to write. Raises StateError, OSError."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o022:
        raise StateError(f"{file} may be written by others ({mode:04o}): chmod {mode & ~0o022:04o} it first")


def _refuse_wider(path: Path, forbidden: int) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & forbidden:
        raise StateError(f"{path} may be read by others ({mode:04o}): chmod {mode & ~forbidden:04o} it first")
