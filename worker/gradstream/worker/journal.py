"""What the gang writes to the log on disk, and how it waits when the disk refuses."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
import structlog

from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Commit, LogEntry, RecordWrite
from gradstream.shared.wire import Plan
from gradstream.worker.disklog.frames import LoggedBatch, LoggedOutcome, LoggedRecord, Position
from gradstream.worker.disklog.writer import DiskLogWriter

_RETRY_S = 1.0

_PLAN: msgspec.msgpack.Decoder[Plan] = msgspec.msgpack.Decoder(Plan)

_log = structlog.get_logger(__name__)


class Journal:
    """The log of one epoch. Called by the reading, the leading and the committing thread.

    A disk that refuses is waited out by the reading and the committing thread: nothing is handed on and nothing is committed that is not
    in the log. open_jobs: where the jobs stand
    that earlier epochs logged and that have no outcome.
    """

    def __init__(self, writer: DiskLogWriter, *, open_jobs: Mapping[FutureId, Position]) -> None:
        self._writer = writer
        self._lock = threading.Lock()
        self._open = dict(open_jobs)

    def log_read(self, entries: Sequence[LogEntry]) -> None:
        """Log the open jobs that are not in the log yet."""
        position = self._writer.position()
        with self._lock:
            fresh = [entry for entry in entries if entry.is_open and entry.job.future_id not in self._open]
            # Before they are written, so that no scan_from lies behind them.
            self._open.update((entry.job.future_id, position) for entry in fresh)
        if fresh:
            _patiently(lambda: self._writer.append_jobs(fresh))

    def started(self, number: int, future_ids: Sequence[FutureId]) -> None:
        """Log that these jobs are about to run. Without room on the disk it is not known: their batch will have to wait anyway."""
        _once(lambda: self._writer.append_started(number, future_ids))

    def dropped(self, future_ids: Sequence[FutureId]) -> None:
        """Log that these jobs were cancelled before they ran."""
        _once(lambda: self._writer.append_dropped(future_ids))
        self._close(future_ids)

    def stopped(self, future_ids: Sequence[FutureId]) -> None:
        """Log that these jobs are left undone by a clean stop."""
        _once(lambda: self._writer.append_stopped(future_ids))

    def batch(self, commit: Commit) -> None:
        """Log a batch that is about to be committed."""
        batch = commit.batch or BatchId(commit.epoch, commit.number)
        logged = LoggedBatch(
            epoch=batch.epoch,
            number=batch.number,
            plan=_PLAN.decode(commit.plan),
            outcomes=[
                LoggedOutcome(future_id=ended.job.future_id, status=ended.status, digest=ended.digest, data=ended.data)
                for ended in commit.outcomes
            ],
            cursor=commit.cursor,
            at_ms=commit.at_ms,
            records=[_logged(write) for write in commit.records],
            context=[_logged(write) for write in commit.context],
            sources=dict(commit.sources),
            elapsed_ms=commit.elapsed_ms,
        )
        _patiently(lambda: self._writer.append_batch(logged))
        self._close([ended.job.future_id for ended in commit.outcomes])

    def scan_from(self) -> Position:
        """Where a reader must start to meet every job that has no outcome yet, and everything that follows."""
        end = self._writer.position()
        with self._lock:
            return min(self._open.values(), default=end)

    def sync(self) -> None:
        """Return when all that was logged is on disk."""
        self._writer.sync()

    def close(self) -> None:
        """Sync, and end the writer."""
        self._writer.close()

    def _close(self, future_ids: Sequence[FutureId]) -> None:
        with self._lock:
            for future_id in future_ids:
                self._open.pop(future_id, None)


def _logged(write: RecordWrite) -> LoggedRecord:
    fields = None if write.fields is None else dict(write.fields)
    return LoggedRecord(kind=write.kind, record_id=write.record_id, fields=fields)


def _patiently(write: Callable[[], object]) -> None:
    while not _once(write):
        time.sleep(_RETRY_S)


def _once(write: Callable[[], object]) -> bool:
    """Write; False when the disk refuses, which is logged."""
    try:
        write()
    except StorageFailure as error:
        _log.error("joblog_not_written", reason=error.message)
        return False
    return True
