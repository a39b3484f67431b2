"""Small jobs, batches and logs on disk."""

from collections.abc import Collection, Sequence
from pathlib import Path

from gradstream.shared import codec
from gradstream.shared.clock import Clock, ManualClock
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.port import FutureStatus, LogEntry
from gradstream.shared.wire import Job, OptimStepDone, Plan
from gradstream.worker.disklog.frames import Frame, LoggedBatch, LoggedOutcome, Position
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.writer import DiskLogWriter, Opening, Sync


def future(number: int, model: str = "s:train:0") -> FutureId:
    return FutureId(f"{model}:{number}")


def entry(number: int, *, model: str = "s:train:0", payload: bytes = b"payload") -> LogEntry:
    """The model's job of this seq, which is also its entry's number."""
    job = Job(
        future_id=future(number, model),
        owner=ModelId(model),
        seq=number,
        op="forward_backward",
        tenant=LOCAL_TENANT,
        payload=payload,
        num_tokens=7,
    )
    return LogEntry(entry_id=f"{number}-0", job=job, at_ms=1_700_000_000_000 + number)


def batch(
    number: int, future_ids: Sequence[FutureId], *, epoch: int = 1, kind: str = "forward_backward", cursor: str = "0-0"
) -> LoggedBatch:
    """A batch that ended all its jobs."""
    return LoggedBatch(
        epoch=epoch,
        number=number,
        plan=Plan(kind=kind, future_ids=list(future_ids), row_budget_tokens=512),
        outcomes=[outcome(future_id) for future_id in future_ids],
        cursor=cursor,
        at_ms=1_700_000_000_000,
    )


def outcome(future_id: FutureId) -> LoggedOutcome:
    data = codec.encode(OptimStepDone(metrics={future_id: 1.5}))
    return LoggedOutcome(future_id=future_id, status=FutureStatus.DONE, digest=codec.digest(data), data=data)


def open_writer(
    directory: Path,
    *,
    epoch: int = 1,
    after: Position | None = None,
    known_open: Collection[FutureId] = (),
    sync: Sync = "no",
    segment_bytes: int = 1024**2,
    clock: Clock | None = None,
) -> DiskLogWriter:
    opening = Opening(engine="main", epoch=epoch, fingerprint="torch=1", after=after, known_open=known_open)
    return DiskLogWriter.open(directory, opening, sync=sync, segment_bytes=segment_bytes, clock=clock or ManualClock())


def succeed(directory: Path, *, segment_bytes: int = 1024**2, clock: Clock | None = None) -> DiskLogWriter:
    """A writer of the next epoch, behind the log as it is now."""
    tail = DiskLog(directory).tail()
    return open_writer(
        directory,
        epoch=tail.epoch + 1,
        after=tail.end,
        known_open=tail.open_jobs.keys(),
        segment_bytes=segment_bytes,
        clock=clock,
    )


def frames(directory: Path) -> list[Frame]:
    """All frames of the log."""
    return [frame for _, frame in DiskLog(directory).scan()]


def last_segment(directory: Path) -> Path:
    return max(directory.glob("*.seg"))


def run_jobs(writer: DiskLogWriter, numbers: Collection[int], *, epoch: int = 1, payload: bytes = b"payload") -> None:
    """Log these jobs, each with its start and the batch that ends it; batch and job have one number."""
    for number in numbers:
        writer.append_jobs([entry(number, payload=payload)])
        writer.append_started(number, [future(number)])
        writer.append_batch(batch(number, [future(number)], epoch=epoch, cursor=f"{number}-0"))
