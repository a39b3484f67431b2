"""Models in files: what neither the device nor the memory of the host holds for the moment.

A file is worth nothing to another process: the gang's successor brings models back from snapshots and the log. So files are not
synced, they go with the models that they hold, and a process takes away the directories of those that have ended. A directory is
its process's own as long as that holds the lock on the file `lock` in it.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradstream.engine.checkpoint.peft_format import write_tensors
from gradstream.engine.files import storage_errors

PARKED = "parked"
_LOCK = "lock"
_SUFFIX = ".safetensors"


class ParkedFileDamaged(Exception):
    """A file with the state of a model is not as it was written. The process must end: its successor has the model from the log."""


@dataclass(eq=False)
class ParkedFile:
    """Tensors in a file, which is removed when nobody holds this object any more. sha256: hex, of the whole file."""

    path: Path
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        weakref.finalize(self, _remove, self.path)

    def read(self) -> dict[str, Tensor]:
        """The tensors, on the CPU, mapped from the file, not to be changed; they live on when the file is removed.

        Raises ParkedFileDamaged when the file is gone, cannot be read, or is not as it was written.
        """
        try:
            with self.path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.sha256:
                raise ParkedFileDamaged(f"{self.path} does not have the digest that it was written with")
            with safe_open(self.path, framework="pt") as tensors:
                return {name: tensors.get_tensor(name) for name in sorted(tensors.keys())}
        except (OSError, SafetensorError) as error:
            raise ParkedFileDamaged(f"{self.path} cannot be read: {type(error).__name__}: {error}") from error


class ParkingPlace:
    """A directory of this process below `parent`, made when it is first needed and removed with this object."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._directory: Path | None = None
        self._number = 0

    def write(self, tensors: dict[str, Tensor]) -> ParkedFile:
        """The tensors in a new file. Raises StorageFailure, with nothing left of it, when the file system refuses."""
        with storage_errors(f"cannot write below {self._parent}"):
            if self._directory is None:
                self._directory = self._open()
            self._number += 1
            path = self._directory / f"{self._number:08d}{_SUFFIX}"
            try:
                write_tensors(path, tensors, metadata={"format": "pt"})
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            except BaseException:
                _remove(path)
                raise
        return ParkedFile(path=path, sha256=sha256, size_bytes=path.stat().st_size)

    def _open(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        # Under another name until it is locked: a process that starts may not take it for one that was left.
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self._parent))
        descriptor = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        directory = draft.rename(self._parent / draft.name.removeprefix("."))
        weakref.finalize(self, _close, directory, descriptor)
        return directory


def remove_left(parent: Path) -> None:
    """Remove the directories of processes that have ended."""
    for directory in parent.glob("[!.]*"):
        with suppress(OSError):
            descriptor = os.open(directory / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory, ignore_errors=True)
            finally:
                os.close(descriptor)


def _close(directory: Path, descriptor: int) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    os.close(descriptor)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
