"""Models in files: what neither the device nor the memory of the host holds for the moment.

A file is worth nothing to another process: the gang's successor brings models back from snapshots and the log. So files are bare
bytes, of which only this process knows what they mean. They are not synced, they go with the models that they hold, and a process takes
away the directories of those that have ended. A directory is its process's own as long as that holds the lock on the file `lock` in it.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradstream.engine.files import storage_errors

PARKED = "parked"
SUFFIX = ".parked"
_LOCK = "lock"
# Where a tensor begins, so that it can be used as it is mapped.
_ALIGNMENT = 64
# Bytes that are hashed and written at a time, while they are in the processor's cache.
_CHUNK_BYTES = 1 << 20


class ParkedFileDamaged(Exception):
    """A file with the state of a model is not as it was written. The process must end: its successor has the model from the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Where a tensor lies in a file, in bytes, and what it is."""

    start: int
    end: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(eq=False)
class ParkedFile:
    """Tensors in a file, which is removed when nobody holds this object any more. sha256: hex, of the whole file."""

    path: Path
    sha256: str
    size_bytes: int
    stretches: Mapping[str, Stretch]

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
            data = torch.from_file(str(self.path), size=self.size_bytes, dtype=torch.uint8)
            return {
                name: data[one.start : one.end].view(one.dtype).view(one.shape) for name, one in self.stretches.items()
            }
        except (OSError, RuntimeError) as error:
            raise ParkedFileDamaged(f"{self.path} cannot be read: {type(error).__name__}: {error}") from error


class ParkingPlace:
    """A directory of this process below `parent`, made when it is first needed and removed with this object.

    write is for one thread at a time: for the one that `start` hands it to, where that is used.
    """

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._directory: Path | None = None
        self._number = 0
        # Its thread starts with the first file, and ends with this object.
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parking")

    def start(self, tensors: Mapping[str, Tensor]) -> "Future[ParkedFile]":
        """Write the tensors from a thread, in the order of the calls; nobody may change them until that is done."""
        return self._writer.submit(self.write, tensors)

    def settle(self) -> None:
        """Return when nothing is being written."""
        self._writer.submit(int).result()

    def write(self, tensors: Mapping[str, Tensor]) -> ParkedFile:
        """The tensors in a new file. Raises StorageFailure, with nothing left of it, when the file system refuses."""
        with storage_errors(f"cannot write below {self._parent}"):
            if self._directory is None:
                self._directory = self._open()
            self._number += 1
            path = self._directory / f"{self._number:08d}{SUFFIX}"
            try:
                return write_parked(path, tensors)
            except BaseException:
                _remove(path)
                raise

    def _open(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        # Under another name until it is locked: a process that starts may not take it for one that was left.
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self._parent))
        descriptor = os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        directory = draft.rename(self._parent / draft.name.removeprefix("."))
        weakref.finalize(self, _close, directory, descriptor)
        return directory


def write_parked(path: Path, tensors: Mapping[str, Tensor]) -> ParkedFile:
    """The tensors, of the CPU, in a new file. Raises OSError, with what was written."""
    digest = hashlib.sha256()
    stretches: dict[str, Stretch] = {}
    size = 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            start, end = size, size + tensor.nbytes
            stretches[name] = Stretch(start=start, end=end, dtype=tensor.dtype, shape=tensor.shape)
            size = end + -end % _ALIGNMENT
            data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
            chunks: list[memoryview | bytes] = [
                data[at : at + _CHUNK_BYTES].data for at in range(0, len(data), _CHUNK_BYTES)
            ]
            for chunk in [*chunks, bytes(size - end)]:
                digest.update(chunk)
                file.write(chunk)
    return ParkedFile(path=path, sha256=digest.hexdigest(), size_bytes=size, stretches=stretches)


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
