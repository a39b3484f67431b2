"""The disk space that saves may take: what lies there is measured, the coming save is counted, and one too many is refused."""

import os
from collections.abc import Sequence
from pathlib import Path

from gradstream.engine.adapters.layout import AdapterLayout
from gradstream.engine.optim._base import StatePart
from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.errors import StorageLimit

# Others write below the directory too (logs, the queue's data), and housekeeping removes; so a measurement is believed this long.
_MEASURE_EVERY_S = 60.0
_BYTES_PER_WEIGHT = 4
# A safetensors header names each tensor with dtype, shape and offsets; the longest names here have under 150 characters.
_HEADER_BYTES_PER_TENSOR = 320
# Manifest, adapter config, directory entries.
_FIXED_BYTES = 32 * 1024


def save_size_bytes(layout: AdapterLayout, *, state: Sequence[StatePart] = (), metadata_bytes: int = 0) -> int:
    """An upper bound, close to exact, of what a save of an adapter takes on disk. state: what of its optimizer is saved too."""
    num_tensors = len(layout.tensors) + sum(len(part.tensors) for part in state)
    return (
        layout.num_params * _BYTES_PER_WEIGHT
        + sum(part.numel * part.dtype.itemsize for part in state)
        + num_tensors * _HEADER_BYTES_PER_TENSOR
        + _FIXED_BYTES
        + metadata_bytes
    )


def size_bytes(directory: Path) -> int:
    """The bytes of all files below directory; 0 when there is none. Files that vanish meanwhile do not count."""
    total = 0
    pending = [os.fspath(directory)]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += _file_bytes(entry)
        except (FileNotFoundError, NotADirectoryError):
            continue
    return total


class DiskBudget:
    """Decides on one rank whether a save still fits below root. limit_bytes None lets every save pass.

    Between measurements it counts the saves that it admitted; a save is refused only on a fresh measurement.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None, clock: Clock | None = None) -> None:
        self._root = root
        self._limit_bytes = limit_bytes
        self._clock = clock or SystemClock()
        self._used_bytes = 0
        self._measured_s: float | None = None

    def admit(self, coming_bytes: int, *, replaced_bytes: int = 0, what: str) -> None:
        """Count a save that is about to be written in place of replaced_bytes; raises StorageLimit when it does not fit."""
        limit = self._limit_bytes
        if limit is None:
            return
        now_s = self._clock.monotonic_s()
        added = coming_bytes - replaced_bytes
        if self._measured_s is None or now_s - self._measured_s > _MEASURE_EVERY_S or self._used_bytes + added > limit:
            self._used_bytes = size_bytes(self._root)
            self._measured_s = now_s
        if self._used_bytes + added > limit:
            instead = f" in place of {replaced_bytes}" if replaced_bytes else ""
            raise StorageLimit(
                f"cannot write {what}: it takes {coming_bytes} bytes{instead}, {self._used_bytes} of storage_limit {limit} are used; "
                "nothing was written. Delete checkpoints, or give them a time to live"
            )
        self._used_bytes += added


def _file_bytes(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
