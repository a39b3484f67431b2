"""What the disk tells a new gang: a snapshot that counts, and the batches after it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from gradstream.engine.snapshot.cut import Cut
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Ended
from gradstream.worker.disklog.chain import resolve
from gradstream.worker.disklog.errors import LogDamaged, UnknownPosition
from gradstream.worker.disklog.frames import Dropped, Frame, LoggedBatch, LoggedJob, Position, Started, Stopped
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.tail import Tail
from gradstream.worker.recovery.replay import STATEFUL, PastBatch

_log = structlog.get_logger(__name__)


@dataclass(slots=True, kw_only=True)
class Past:
    """The log from a place on. ids: of all batches that were met, in order. batches, frames, jobs_of: those that were asked for, with
    their jobs, and as they were logged.

    open_jobs: those without an outcome, in the order of the log, and where they stand. starts: by open job, the epochs in which it was
    started and did not end. is_whole: reading began where the very first gang began to write.
    """

    is_whole: bool
    ids: list[BatchId] = field(default_factory=list)
    batches: list[PastBatch] = field(default_factory=list)
    frames: list[LoggedBatch] = field(default_factory=list)
    jobs_of: dict[BatchId, list[LoggedJob]] = field(default_factory=dict)
    open_jobs: dict[FutureId, tuple[Position, LoggedJob]] = field(default_factory=dict)
    starts: dict[FutureId, set[int]] = field(default_factory=dict)

    @property
    def last(self) -> BatchId | None:
        """The newest batch."""
        return self.ids[-1] if self.ids else None

    def after(self, batch: BatchId | None) -> list[PastBatch]:
        """The batches after one; None: all."""
        return [past for past in self.batches if batch is None or past.batch > batch]

    def has(self, batch: BatchId) -> bool:
        return batch in self.ids


# Which batches are kept with their jobs: the others are counted only.
Keep = Callable[[LoggedBatch], bool]


def read(log: DiskLog, start: Position | None, *, keep: Keep) -> Past:
    """The log from start (None: from its oldest segment) to its end. Raises LogDamaged, UnknownPosition."""
    links = resolve(log.directory)
    fingerprints = {link.segment.name: link.segment.head.fingerprint for link in links}
    past = Past(is_whole=start is None and bool(links) and links[0].segment.head.after is None)
    for position, frame in log.scan(start):
        if isinstance(frame, LoggedBatch) and past.last is not None and frame.batch_id <= past.last:
            raise LogDamaged(
                log.directory / position.segment, position.offset, f"batch {frame.batch_id} follows {past.last}"
            )
        _take_in(past, position, frame, keep, fingerprint=fingerprints.get(position.segment, ""))
    return past


def position_of(cut: Cut) -> Position:
    """Where to read the log from, to meet every job that had no outcome at the cut."""
    return Position(cut.head.log_segment, cut.head.log_offset)


def tail_of(log: DiskLog, store: SnapshotStore) -> Tail:
    """The end of the log, found from the newest snapshot that lies on it. Raises LogDamaged."""
    for cut in store.cuts():
        with suppress(UnknownPosition):
            if _meets(log, position_of(cut), BatchId(*cut.id)):
                return log.tail(position_of(cut))
    return log.tail()


def _meets(log: DiskLog, start: Position, batch: BatchId) -> bool:
    """True when the log from start on has the batch. A snapshot may be of one that was never logged."""
    return any(isinstance(frame, LoggedBatch) and frame.batch_id == batch for _, frame in log.scan(start))


def cuts_that_count(log: DiskLog, store: SnapshotStore, *, last: BatchId | None) -> Iterator[tuple[Cut, Past]]:
    """Snapshots whose batch is in the log, newest first, each with the log from where its jobs begin; files are not verified.

    A snapshot that a fenced gang wrote is of a batch that the log does not have. last: the newest batch that Redis has. Kept are the
    batches that a replay from the snapshot runs, and those that Redis lacks.
    """
    survey = store.survey()
    for problem in survey.problems:
        _log.warning("snapshot_unreadable", reason=problem)
    for cut in survey.cuts:
        try:
            past = read(log, position_of(cut), keep=keep_after(BatchId(*cut.id), last=last))
        except (UnknownPosition, LogDamaged) as error:
            _log.warning("snapshot_not_on_the_log", batch=str(BatchId(*cut.id)), reason=str(error))
            continue
        if past.has(BatchId(*cut.id)):
            yield cut, past
        else:
            _log.warning("snapshot_not_on_the_log", batch=str(BatchId(*cut.id)), reason="the log has no such batch")


def keep_after(cut: BatchId | None, *, last: BatchId | None) -> Keep:
    """Batches that change training state after a cut (None: all such), and those that Redis, which has up to last, lacks."""

    def keep(frame: LoggedBatch) -> bool:
        is_replayed = frame.plan.kind in STATEFUL and (cut is None or frame.batch_id > cut)
        return is_replayed or last is None or frame.batch_id > last

    return keep


def _take_in(past: Past, position: Position, frame: Frame, keep: Keep, *, fingerprint: str) -> None:
    match frame:
        case LoggedJob(job=job):
            past.open_jobs.setdefault(job.future_id, (position, frame))
        case Started(epoch=epoch, future_ids=future_ids):
            for future_id in future_ids:
                past.starts.setdefault(future_id, set()).add(epoch)
        case Stopped(epoch=epoch, future_ids=future_ids):
            for future_id in future_ids:
                past.starts.get(future_id, set()).discard(epoch)
        case Dropped(future_ids=future_ids):
            _close(past, future_ids)
        case LoggedBatch():
            past.ids.append(frame.batch_id)
            if keep(frame) and (batch := _past_batch(past, frame, fingerprint)) is not None:
                past.batches.append(batch)
                past.frames.append(frame)
                past.jobs_of[batch.batch] = [past.open_jobs[outcome.future_id][1] for outcome in frame.outcomes]
            _close(past, [outcome.future_id for outcome in frame.outcomes])
        case _:
            pass


def _past_batch(past: Past, frame: LoggedBatch, fingerprint: str) -> PastBatch | None:
    """The batch with its jobs; None when it is one before the place where all jobs are known."""
    if any(outcome.future_id not in past.open_jobs for outcome in frame.outcomes):
        return None
    ended = [
        Ended(
            job=past.open_jobs[outcome.future_id][1].job,
            status=outcome.status,
            data=outcome.data,
            digest=outcome.digest,
        )
        for outcome in frame.outcomes
    ]
    return PastBatch(
        batch=frame.batch_id,
        plan=frame.plan,
        ended=ended,
        sources=frame.sources,
        at_ms=frame.at_ms,
        elapsed_ms=frame.elapsed_ms,
        fingerprint=fingerprint,
    )


def _close(past: Past, future_ids: Sequence[FutureId]) -> None:
    for future_id in future_ids:
        past.open_jobs.pop(future_id, None)
        past.starts.pop(future_id, None)
