"""Where a gang prepares its saves: a directory of its epoch, which its successor takes away.

A save becomes visible by one rename out of that directory. Either the rename comes before the directory is taken away, and so before
anything that the successor does, or it fails: a gang that stood still inside a save and wakes up later changes nothing. This needs no
lock, which a process that stands still would keep.
"""

import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gradstream.engine.checkpoint.location import CHECKPOINTS, SAMPLERS
from gradstream.engine.files import Revoked, make_directories, storage_errors

FOLDER = ".drafts"
_ROOTS = (CHECKPOINTS, SAMPLERS)
_EPOCH = re.compile(r"\d{8}")


class Drafts:
    """The directories of one engine's epoch: output_dir/ROOT/.drafts/ENGINE/EPOCH, one below each root, as a root may be a mount."""

    def __init__(self, output_dir: Path, *, engine: str, epoch: int) -> None:
        self._output_dir = output_dir
        self._engine = engine
        self._epoch = epoch

    def take(self) -> None:
        """Make the epoch's directories, and take away those of earlier epochs with what is in them. May be called again.

        Raises Revoked when a later epoch has begun, StorageFailure when the disk refuses.
        """
        for root in _ROOTS:
            parent = _parent(self._output_dir, root, self._engine)
            with storage_errors(f"cannot prepare saves in {parent}"):
                # Made before the look: of two gangs that do this at once, at least the earlier one sees the later.
                make_directories(self._folder(root))
                epochs = dict(_epochs(parent))
                if (newest := max(epochs, default=0)) > self._epoch:
                    raise Revoked(f"epoch {newest} has begun after epoch {self._epoch}")
                for epoch, folder in epochs.items():
                    if epoch < self._epoch:
                        _take_away(folder)
                _sweep(parent)

    def folder(self, target: Path) -> Path:
        """Where the draft of target, a directory below one of the roots, is made."""
        return self._folder(target.relative_to(self._output_dir).parts[0])

    def _folder(self, root: str) -> Path:
        return _parent(self._output_dir, root, self._engine) / f"{self._epoch:08d}"


def newest_drafts(output_dir: Path, *, engine: str) -> int:
    """The highest epoch that has prepared saves here; 0 when none has."""
    epochs = (epoch for root in _ROOTS for epoch, _ in _epochs(_parent(output_dir, root, engine)))
    return max(epochs, default=0)


def _parent(output_dir: Path, root: str, engine: str) -> Path:
    return output_dir / root / FOLDER / engine


def _epochs(parent: Path) -> Iterator[tuple[int, Path]]:
    if parent.is_dir():
        for path in parent.iterdir():
            if _EPOCH.fullmatch(path.name):
                yield int(path.name), path


def _take_away(folder: Path) -> None:
    with suppress(FileNotFoundError):
        folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.gone"))


def _sweep(parent: Path) -> None:
    """Remove what was taken away, by this gang or by one that died before it could."""
    for path in parent.glob("*.gone"):
        shutil.rmtree(path, ignore_errors=True)
