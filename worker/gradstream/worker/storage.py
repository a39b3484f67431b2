"""What lies in the output directory, as the worker's records describe it: manifests to read, directories to remove."""

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.budget import DiskBudget, size_bytes
from gradstream.engine.checkpoint.copy import CopyOrder, copy_checkpoint
from gradstream.engine.checkpoint.location import CHECKPOINTS, SAMPLERS, Location, parse_uri
from gradstream.engine.checkpoint.manifest import Manifest, change_ttl, read_manifest
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError, StorageFailure, UnknownModel

_REMOVED = ".removed-"


class Storage:
    """Checkpoints and samplers below one output directory, by their URIs. limit_bytes: what may lie there in all."""

    def __init__(self, output_dir: Path, *, limit_bytes: int | None = None) -> None:
        self._output_dir = output_dir
        self._limit_bytes = limit_bytes

    def manifest(self, uri: str) -> Manifest:
        """The manifest of a save; raises UnknownModel or StorageFailure as `read_manifest` does."""
        return read_manifest(parse_uri(uri).directory(self._output_dir), source=uri)

    def source(self, uri: str) -> str:
        """A digest that changes with the weights of a save, and not with its time to live; empty when there is no such save."""
        try:
            manifest = self.manifest(uri)
        except GradstreamError:
            return ""
        return codec.digest(msgspec.json.encode((manifest.created_ms, manifest.job, manifest.files), order="sorted"))

    def change_ttl(self, uri: str, *, created_ms: int, expires_ms: int | None) -> bool:
        """See manifest.change_ttl."""
        directory = parse_uri(uri).directory(self._output_dir)
        return change_ttl(directory, created_ms=created_ms, expires_ms=expires_ms, source=uri)

    def copy(self, order: CopyOrder) -> Manifest:
        """See `copy_checkpoint`; the space is counted against limit_bytes."""
        budget = DiskBudget(self._output_dir, limit_bytes=self._limit_bytes)
        return copy_checkpoint(order, self._output_dir, budget=budget)

    def checkpoints(self) -> Iterator[Manifest]:
        """The manifest of every named save that can be read."""
        yield from _manifests(self._output_dir / CHECKPOINTS, "*/*/*")

    def samplers(self) -> Iterator[Manifest]:
        """The manifest of every ephemeral snapshot that can be read."""
        yield from _manifests(self._output_dir / SAMPLERS, "*")

    def used_bytes(self) -> int:
        """All files below the output directory."""
        return size_bytes(self._output_dir)

    def snapshots(self) -> dict[str, float]:
        """When each ephemeral snapshot was used last, in milliseconds since the Unix epoch, by the name of its directory."""
        used_ms: dict[str, float] = {}
        for path in (self._output_dir / SAMPLERS).glob("[!.]*"):
            with suppress(FileNotFoundError):
                used_ms[path.name] = 1000 * path.stat().st_mtime
        return used_ms

    def remove_snapshot(self, name: str) -> bool:
        """Delete an ephemeral snapshot by the name of its directory; True when there was one."""
        return _remove(self._output_dir / SAMPLERS / name)

    def remove(self, location: Location) -> bool:
        """Delete a save; True when there was one. Renamed first, so that a reader finds all of it or nothing."""
        return _remove(location.directory(self._output_dir))

    def remove_saved(self, manifest: Manifest) -> bool:
        """Delete the save that manifest describes; True when there was one."""
        return self.remove(parse_uri(manifest.source))

    def remove_leftovers(self, *, before_ms: int) -> int:
        """Delete drafts and half-removed directories that nothing has touched since before_ms; how many."""
        num_removed = 0
        for root, pattern in ((CHECKPOINTS, "*/*/.*"), (SAMPLERS, ".*")):
            for path in (self._output_dir / root).glob(pattern):
                is_leftover = path.name.endswith(".tmp") or path.name.startswith(_REMOVED)
                if is_leftover and path.is_dir() and 1000 * path.stat().st_mtime < before_ms:
                    shutil.rmtree(path, ignore_errors=True)
                    num_removed += 1
        return num_removed


def _manifests(root: Path, pattern: str) -> Iterator[Manifest]:
    for directory in sorted(root.glob(pattern)):
        if not directory.name.startswith("."):
            with suppress(UnknownModel, StorageFailure):
                yield read_manifest(directory, source=str(directory))


def _remove(directory: Path) -> bool:
    doomed = directory.with_name(f"{_REMOVED}{directory.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    try:
        directory.rename(doomed)
    except FileNotFoundError:
        return False
    shutil.rmtree(doomed)
    return True
