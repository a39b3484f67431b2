"""A private directory in which the ranks of one machine meet, and which does not stay behind."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "gradstream-ranks-"
_LOCK = "lock"


@contextmanager
def meeting_place() -> Iterator[Path]:
    """A directory that only this user can open, for the duration of the block; those of processes that were killed are removed first.

    It is in the temporary directory and not below output_dir, which may be full, or on a file system without locks.
    """
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    # Swept by its final name only, which it has when its lock is held.
    draft = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
    lock = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = draft.rename(parent / draft.name.removeprefix("."))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _sweep(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                _remove_abandoned(folder)


def _remove_abandoned(folder: Path) -> None:
    """Remove the directory of a process that is no more. Raises OSError when it lives, or cannot be asked."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(lock)
