"""What lies in the output directory, as the worker's records describe it: manifests to read, directories to remove."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.budget import DiskBudget, size_bytes
from gradstream.engine.checkpoint.copy import CopyOrder, copy_checkpoint
from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.checkpoint.location import CHECKPOINTS, SAMPLERS, Location, parse_uri
from gradstream.engine.checkpoint.manifest import Manifest, change_ttl, read_manifest
from gradstream.engine.files import mark_used
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError, StorageFailure, UnknownModel
from gradstream.shared.exports import EXPORTS

_REMOVED = ".removed-"


class Storage:
    """Checkpoints and samplers below one output directory, by their URIs. limit_bytes: what may lie there in all.

    drafts: where a gang prepares its copies, None for a process that is no gang.
    """

    def __init__(self, output_dir: Path, *, limit_bytes: int | None = None, drafts: Drafts | None = None) -> None:
        self._output_dir = output_dir
        self._limit_bytes = limit_bytes
        self._drafts = drafts

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
        return copy_checkpoint(order, self._output_dir, budget=budget, drafts=self._drafts)

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

    def remove_save(self, location: Location, *, created_ms: int) -> bool:
        """Delete the save that was made at created_ms; True when there was one. Any other save under its name stays.

        A save that comes at the same moment takes the name that this one leaves for an instant, and keeps it.
        """
        directory = location.directory(self._output_dir)
        if not _is_of(directory, created_ms) or (doomed := set_aside(directory)) is None:
            return False
        # Again, now that nobody can exchange it any more.
        if _is_of(doomed, created_ms):
            shutil.rmtree(doomed)
            return True
        put_back(doomed, directory)
        return False

    def remove(self, location: Location) -> bool:
        """Delete a save; True when there was one. Renamed first, so that a reader finds all of it or nothing."""
        return _remove(location.directory(self._output_dir))

    def remove_saved(self, manifest: Manifest) -> bool:
        """Delete the save that manifest describes; True when there was one. A later one of its name stays."""
        return self.remove_save(parse_uri(manifest.source), created_ms=manifest.created_ms)

    def exports(self) -> dict[str, float]:
        """When each export was written, in milliseconds since the Unix epoch, by its directory below the output directory."""
        written_ms: dict[str, float] = {}
        for path in (self._output_dir / EXPORTS).glob("[!.]*"):
            with suppress(FileNotFoundError):
                written_ms[f"{EXPORTS}/{path.name}"] = 1000 * path.stat().st_mtime
        return written_ms

    def remove_export(self, directory: str) -> bool:
        """Delete an export by its directory; True when there was one."""
        return _remove(self._output_dir / directory)

    def remove_leftovers(self, *, before_ms: int) -> int:
        """Delete drafts and half-removed directories that nothing has touched since before_ms; how many."""
        num_removed = 0
        for root, pattern in ((CHECKPOINTS, "*/*/.*"), (SAMPLERS, ".*"), (EXPORTS, ".*")):
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
    doomed = set_aside(directory)
    if doomed is None:
        return False
    shutil.rmtree(doomed)
    return True


def set_aside(directory: Path) -> Path | None:
    """Take a save's name away; its new place, which is read by nobody, or None when there was no save."""
    if not directory.is_dir():
        return None
    doomed = Path(tempfile.mkdtemp(prefix=f"{_REMOVED}{directory.name}.", dir=directory.parent))
    try:
        # rename(2) takes the place of an empty directory.
        directory.rename(doomed)
    except FileNotFoundError:
        doomed.rmdir()
        return None
    # Young, so that the sweep of leftovers does not come upon it while it is looked at.
    mark_used(doomed)
    return doomed


def put_back(doomed: Path, directory: Path) -> None:
    """Give a save that was set aside its name again, unless a newer one has taken it: then it was replaced, and goes."""
    try:
        # Onto a directory that is not empty, as every save is, rename(2) fails.
        doomed.rename(directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(doomed)


def _is_of(directory: Path, created_ms: int) -> bool:
    """True when the save in directory was made then; also for one that cannot be read, which no newer save is."""
    try:
        return read_manifest(directory, source=str(directory)).created_ms == created_ms
    except (UnknownModel, StorageFailure):
        return True
