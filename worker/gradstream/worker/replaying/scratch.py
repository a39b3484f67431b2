"""The output directory of a replay: what it saves, and links to what it loads that was saved before."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.location import Location, parse_uri
from gradstream.engine.checkpoint.manifest import MANIFEST_FILE, read_manifest, write_manifest
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import FutureStatus
from gradstream.shared.wire import CopyCheckpoint, Job, Outcome
from gradstream.worker.disklog.frames import LoggedBatch
from gradstream.worker.records import saved_uri
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.overview import TOUCH_FILES, loaded_uri
from gradstream.worker.storage import Storage
from gradstream.worker.storage_jobs import storage_outcome

_CREATED = "created_ms"


class Scratch:
    """Checkpoints below a directory of the replay's own. original: the server's output_dir, which is only read; None when unknown.

    compares: whether a checkpoint must have the digest of the one that was loaded then.
    """

    def __init__(self, directory: Path, *, original: Path | None, compares: bool) -> None:
        self.directory = directory
        self._original = original
        self._compares = compares
        self._storage = Storage(directory)
        self._saved: set[str] = set()

    def has(self, uri: str) -> bool:
        """True when the checkpoint can be read here, if need be from the original directory."""
        return self._is_here(parse_uri(uri)) or self._fetch(uri)

    def was_saved(self, uri: str) -> bool:
        """True when the replay itself saved it."""
        return uri in self._saved

    def prepare(self, past: PastBatch) -> dict[str, str]:
        """Bring what a batch loads and clear where it saves; by future, what is wrong with a checkpoint that the replay itself made.

        Raises CannotReplay when a checkpoint is missing, or is not the one that was loaded.
        """
        wrong: dict[str, str] = {}
        if past.plan.kind not in TOUCH_FILES:
            return wrong
        for ended in past.ended:
            if ended.status is not FutureStatus.DONE:
                continue
            outcome = codec.decode_outcome(ended.data)
            if (uri := loaded_uri(outcome)) is not None:
                self._bring(uri)
                self._check(uri, past, ended.job, wrong)
            elif (uri := saved_uri(outcome)) is not None:
                # Whatever had the name was gone then, or was to be overwritten.
                shutil.rmtree(parse_uri(uri).directory(self.directory), ignore_errors=True)
        return wrong

    def settle(self, frame: LoggedBatch, outcomes: Mapping[FutureId, Outcome]) -> None:
        """Give what a batch saved the time of the save that it repeats, so that equal files make equal digests."""
        created = {
            record.record_id: record.fields[_CREATED]
            for record in frame.records
            if record.fields is not None and _CREATED in record.fields
        }
        for outcome in outcomes.values():
            if (uri := saved_uri(outcome)) is None:
                continue
            self._saved.add(uri)
            text = created.get(uri) or created.get(uri.rpartition("/")[2])
            if text is not None and text.isdecimal():
                self._set_created(uri, int(text))

    def repeat(self, job: Job) -> Outcome | None:
        """Do a job that only touches the disk, here; None when it is no such job, or copies what is not there any more."""
        with suppress(GradstreamError):
            match codec.decode_payload(job.payload):
                case CopyCheckpoint(source=source) if not self.has(source):
                    return None
                case _:
                    pass
        return storage_outcome(job, self._storage)

    def _bring(self, uri: str) -> None:
        if not self.has(uri):
            where = "" if self._original is None else f" in {self._original}"
            raise CannotReplay(
                f"checkpoint {uri} was loaded and is missing{where}; begin at a snapshot after that, or put it back"
            )

    def _check(self, uri: str, past: PastBatch, job: Job, wrong: dict[str, str]) -> None:
        wanted = past.sources.get(job.future_id)
        if not self._compares or wanted is None or self._storage.source(uri) == wanted:
            return
        if uri not in self._saved:
            raise CannotReplay(
                f"checkpoint {uri} was replaced since {job.future_id} loaded it; begin at a snapshot after that"
            )
        wrong[job.future_id] = f"checkpoint {uri}, which this replay saved, is not the one that was loaded"

    def _is_here(self, location: Location) -> bool:
        return location.directory(self.directory).is_dir()

    def _fetch(self, uri: str) -> bool:
        """Link the files of a checkpoint from the original directory; False when it is not there."""
        if self._original is None:
            return False
        location = parse_uri(uri)
        source, target = location.directory(self._original), location.directory(self.directory)
        try:
            shutil.copytree(source, target, copy_function=_link)
        except (OSError, shutil.Error):
            shutil.rmtree(target, ignore_errors=True)
            return False
        return True

    def _set_created(self, uri: str, created_ms: int) -> None:
        directory = parse_uri(uri).directory(self.directory)
        manifest = read_manifest(directory, source=uri)
        write_manifest(directory, msgspec.structs.replace(manifest, created_ms=created_ms))


def _link(source: str, target: str) -> None:
    """The file under another name, or a copy where that cannot be; of the manifest always a copy, for it alone is ever changed."""
    if Path(source).name != MANIFEST_FILE:
        with suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)
