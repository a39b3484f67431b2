"""One gang's part of the log, as it is appended to."""

import os
import secrets
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import structlog

from gradstream.engine.files import storage_errors, sync_directory
from gradstream.shared.clock import Clock
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Fenced, LogEntry
from gradstream.worker.disklog import framing
from gradstream.worker.disklog.errors import SyncFailed
from gradstream.worker.disklog.frames import (
    FORMAT_VERSION,
    Dropped,
    Frame,
    LoggedBatch,
    LoggedJob,
    PackedJob,
    Position,
    SegmentHead,
    Started,
    Stopped,
)
from gradstream.worker.disklog.segments import (
    DIRECTORY_MODE,
    SegmentFile,
    epoch_of,
    segment_name,
    segment_paths,
    sync_data,
    sync_file,
)

Sync = Literal["always", "everysec", "no"]

DEFAULT_SEGMENT_BYTES = 256 * 1024**2
_SYNC_INTERVAL_S = 1.0
_CLOSE_TIMEOUT_S = 60.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a gang's part of the log begins with.

    after: the end of the log as the gang found it, which its first head fixes. known_open: jobs that stand there without an
    outcome; they are not written again.
    """

    engine: str
    epoch: int
    fingerprint: str
    after: Position | None
    known_open: Collection[FutureId] = ()


class DiskLogWriter:
    """Appends frames of one epoch. Thread-safe; one per gang.

    A method that raises StorageFailure (the disk is full, an I/O error) has written nothing and may be called again. SyncFailed is
    final: the process must end; so is Fenced, raised when a segment is due and a newer gang's are there. Frames are in the hands of the
    system when a method returns, so a killed process loses none; a power cut loses those since the last sync, which sync says: always, with
    each batch; everysec, once a second; no, when the system likes.
    """

    def __init__(
        self, directory: Path, opening: Opening, *, sync: Sync, segment_bytes: int = DEFAULT_SEGMENT_BYTES, clock: Clock
    ) -> None:
        self._directory = directory
        self._opening = opening
        self._sync_mode = sync
        self._segment_bytes = segment_bytes
        self._clock = clock
        # One salt an epoch, so that frames can be packed before it is known which segment they go to.
        self._salt = secrets.randbits(32)
        self._next_index = 0
        self._segment: SegmentFile | None = None
        self._synced: Position | None = None
        self._sync_error: SyncFailed | None = None
        self._last_batch: BatchId | None = None
        self._open_jobs = set(opening.known_open)
        # _sync_lock is never waited for by a thread that holds _lock.
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def open(
        cls, directory: Path, opening: Opening, *, sync: Sync, segment_bytes: int = DEFAULT_SEGMENT_BYTES, clock: Clock
    ) -> "DiskLogWriter":
        """A writer whose first segment is on disk, by which all that older epochs write from now on counts no more.

        Raises ValueError when the directory holds segments of this epoch or a newer one, StorageFailure when the disk refuses.
        """
        writer = cls(directory, opening, sync=sync, segment_bytes=segment_bytes, clock=clock)
        writer._begin()
        return writer

    def append_jobs(self, entries: Sequence[LogEntry]) -> dict[FutureId, Position]:
        """Log the open jobs among entries that are not in the log yet; where they stand."""
        with self._lock:
            fresh = [e for e in entries if e.is_open and e.job.future_id not in self._open_jobs]
            new_ids = [e.job.future_id for e in fresh]
            self._open_jobs.update(new_ids)
        try:
            return dict(zip(new_ids, self._append([_logged(entry) for entry in fresh]), strict=True))
        except BaseException:
            with self._lock:
                self._open_jobs.difference_update(new_ids)
            raise

    def append_started(self, number: int, future_ids: Sequence[FutureId]) -> None:
        """Say that this gang is about to run these jobs as its batch of this number."""
        self._append([Started(epoch=self._opening.epoch, number=number, future_ids=list(future_ids))])

    def append_dropped(self, future_ids: Sequence[FutureId]) -> None:
        """Say that these jobs will not run."""
        self._append([Dropped(future_ids=list(future_ids))])
        self._end_jobs(future_ids)

    def append_stopped(self, future_ids: Sequence[FutureId]) -> None:
        """Take back this gang's starts of these jobs, which it leaves undone in good order."""
        self._append([Stopped(epoch=self._opening.epoch, future_ids=list(future_ids))])

    def append_batch(self, batch: LoggedBatch) -> Position:
        """Log a batch that ran; where it stands. With sync always it is on disk then.

        Batches come in the order of (epoch, number); those of an earlier epoch, which only Redis still knew, before the own ones.
        Raises ValueError for one out of order.
        """
        with self._lock:
            if self._last_batch is not None and batch.batch_id <= self._last_batch:
                raise ValueError(f"batch {batch.batch_id} does not come after batch {self._last_batch}")
        if batch.epoch > self._opening.epoch:
            raise ValueError(f"batch {batch.batch_id} is not one of epoch {self._opening.epoch} or before")
        (position,) = self._append([batch])
        with self._lock:
            self._last_batch = batch.batch_id
        self._end_jobs([outcome.future_id for outcome in batch.outcomes])
        if self._sync_mode == "always":
            self.sync()
        return position

    def position(self) -> Position:
        """Where the next frame goes."""
        with self._lock:
            return self._current().end

    def sync(self) -> None:
        """Return when all that was appended before is on disk. Raises SyncFailed."""
        with self._sync_lock:
            with self._lock:
                self._check()
                segment = self._current()
                end = segment.end
                if end == self._synced:
                    return
                # A rotation meanwhile closes the segment's own descriptor, after a sync of its own.
                descriptor = segment.duplicate()
            try:
                sync_data(descriptor)
            except OSError as error:
                with self._lock:
                    raise self._failed(error) from error
            finally:
                os.close(descriptor)
            with self._lock:
                self._synced = end

    def close(self) -> None:
        """Sync and let go of the files; afterwards nothing can be appended. Idempotent. Raises SyncFailed."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        with self._lock:
            if self._segment is None:
                return
        try:
            self.sync()
        finally:
            with self._lock:
                segment, self._segment = self._segment, None
                if segment is not None:
                    segment.close()

    def _begin(self) -> None:
        """Make the directory and the first segment, and start the thread that syncs."""
        opening = self._opening
        with storage_errors(f"cannot open the job log in {self._directory}"):
            self._directory.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
            self._directory.chmod(DIRECTORY_MODE)
            sync_directory(self._directory.parent)
            if (paths := segment_paths(self._directory)) and epoch_of(paths[-1].name) >= opening.epoch:
                raise ValueError(
                    f"{paths[-1]} is there already; a gang of epoch {opening.epoch} cannot write behind it: take a higher epoch"
                )
            if opening.after is not None:
                # Its writer may have died before it synced; from here on a power cut must not shorten it.
                sync_file(self._directory / opening.after.segment)
            self._segment = self._create(opening.after)
        self._synced = self._segment.end
        if self._sync_mode == "everysec":
            self._thread = threading.Thread(target=self._run, name="disklog-sync", daemon=True)
            self._thread.start()

    def _append(self, frames: Sequence[Frame | PackedJob]) -> list[Position]:
        """Write frames in one piece; where each one starts."""
        packed = [framing.pack(frame, salt=self._salt) for frame in frames]
        data = packed[0] if len(packed) == 1 else b"".join(packed)
        with self._lock:
            self._check()
            segment = self._with_room()
            start = segment.end
            with storage_errors(f"cannot append to the job log in {self._directory}"):
                segment.append(data)
        positions, offset = [], start.offset
        for item in packed:
            positions.append(Position(start.segment, offset))
            offset += len(item)
        return positions

    def _end_jobs(self, future_ids: Sequence[FutureId]) -> None:
        with self._lock:
            self._open_jobs.difference_update(future_ids)

    def _current(self) -> SegmentFile:
        if self._segment is None:
            raise ValueError("the job log is closed")
        return self._segment

    def _check(self) -> None:
        if self._sync_error is not None:
            raise self._sync_error

    def _failed(self, error: OSError) -> SyncFailed:
        """Note that a sync failed. The system may have dropped what it could not write, so a later success would say nothing."""
        self._sync_error = SyncFailed(f"the job log in {self._directory} could not be synced: {error.strerror}")
        return self._sync_error

    def _with_room(self) -> SegmentFile:
        """The segment to append to: the current one, or a new one when it is full or spoilt. Called under the lock."""
        segment = self._current()
        if segment.end.offset < self._segment_bytes and not segment.is_spoilt:
            return segment
        try:
            # Before the next segment is there, so that a chain of segments never has a hole.
            segment.sync()
        except OSError as error:
            raise self._failed(error) from error
        with storage_errors(f"cannot go on with the job log in {self._directory}"):
            self._segment = self._create(segment.end)
        segment.close()
        self._synced = self._segment.end
        return self._segment

    def _create(self, after: Position | None) -> SegmentFile:
        opening = self._opening
        index = self._next_index
        head = SegmentHead(
            version=FORMAT_VERSION,
            engine=opening.engine,
            epoch=opening.epoch,
            index=index,
            fingerprint=opening.fingerprint,
            created_ms=self._clock.wall_ms(),
            salt=self._salt,
            after=after,
        )
        # Counted first: what a failure may leave under this name is never taken up again.
        self._next_index += 1
        path = self._directory / segment_name(opening.epoch, index)
        segment = SegmentFile.create(path, head)
        newest = segment_paths(self._directory)[-1]
        if epoch_of(newest.name) > opening.epoch:
            # It would not count. But where retention has been, a segment older than all others would look like one with a hole behind it.
            segment.close()
            path.unlink()
            raise Fenced(f"{newest} belongs to a newer gang than that of epoch {opening.epoch}")
        return segment

    def _run(self) -> None:
        while not self._closing.wait(_SYNC_INTERVAL_S):
            try:
                self.sync()
            except SyncFailed as error:
                # Every later call raises it.
                _log.error("disk_log_sync_failed", error=str(error))
                return


def _logged(entry: LogEntry) -> LoggedJob | PackedJob:
    """The entry's frame. A payload that the API has compressed goes to disk as it is."""
    job = msgspec.structs.replace(entry.job, payload=b"") if entry.frame else entry.job
    logged = LoggedJob(
        entry_id=entry.entry_id,
        at_ms=entry.at_ms,
        job=job,
        ordered=entry.ordered,
        again=entry.again,
        record=dict(entry.record),
    )
    return PackedJob(logged=logged, payload=entry.frame) if entry.frame else logged
