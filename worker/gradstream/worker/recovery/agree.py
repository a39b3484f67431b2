"""Redis and the log on disk brought to say the same: whichever lost something gets it back from the other."""

from collections.abc import Iterable
from dataclasses import replace

import structlog

from gradstream.shared import codec
from gradstream.shared.errors import StorageFailure, UnknownModel
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Commit, Ended, Feed, LogEntry, RecordKind, RecordWrite
from gradstream.worker.disklog.frames import Dropped, LoggedBatch, LoggedJob, LoggedRecord
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.journal import Journal
from gradstream.worker.records import checkpoint_fields, is_creator
from gradstream.worker.recovery.past import Past
from gradstream.worker.storage import Storage

_PAGE = 64
_log = structlog.get_logger(__name__)


def catch_up(feed: Feed, journal: Journal, *, last: BatchId | None, epoch: int) -> str | None:
    """Put into the log on disk what Redis committed and a power cut, or a removed directory, took from it.

    last: the newest batch on disk. Returns why that is not possible, None when the disk has everything now.
    """
    newest = feed.last_batch()
    if newest is None or (last is not None and newest <= last):
        return None
    at, num_fetched = last or BatchId(0, 0), 0
    while batches := feed.journaled(at, count=_PAGE):
        for one in batches:
            if one.num_gone or (last is None and not num_fetched and one.batch != BatchId(1, 1)):
                return f"the log on disk ends at batch {last}, and batch {one.batch} is not whole in Redis any more"
            journal.log_read([_as_open(entry) for entry in one.entries])
            journal.batch(
                Commit(
                    epoch=epoch,
                    number=0,
                    batch=one.batch,
                    outcomes=one.ended,
                    plan=one.plan,
                    cursor=feed.cursor(),
                    at_ms=one.at_ms,
                )
            )
            at = one.batch
            num_fetched += 1
    if at != newest:
        return f"the log on disk ends at batch {last}, and Redis has the journal up to {at} of {newest} only"
    _log.warning("joblog_caught_up", after=None if last is None else str(last), num_batches=num_fetched)
    return None


def make_up(
    feed: Feed, log: DiskLog, past: Past, *, epoch: int, storage: Storage | None = None, journal: Journal | None = None
) -> int:
    """Commit the logged batches that Redis lacks, and give it back jobs that it lost; how many batches.

    A gang that died between the log and the commit leaves one or two. A Redis that was emptied, or that a failover put back in time,
    gets back everything that the log still has: outcomes that may still be asked for, records of models, sessions, checkpoints and
    samplers, and the open jobs. A job that it took meanwhile under the seq of a logged one fails; so does the logged one when it is still
    open, as both are one future, and journal learns that it ended. storage: tells which checkpoints are still there, and what they are now.
    """
    last = feed.last_batch()
    num_made_up = 0
    if past.last is not None and (last is None or last < past.last):
        frames = _after(last, past) if last is not None and past.has(last) else _whole(log, last)
        for frame, entries, ended in frames:
            _give_back(feed, entries, epoch=epoch, ended_ms=frame.at_ms)
            _expel(feed, entries, epoch=epoch)
            for record in frame.context:
                feed.restore_record(_write(record), epoch=epoch, made_by=_made_by(record, entries))
            feed.commit(_commit(frame, ended, epoch=epoch, storage=storage))
            num_made_up += 1
    still_open = [_entry(job, is_open=True) for _, job in past.open_jobs.values()]
    num_jobs = _give_back(feed, still_open, epoch=epoch)
    if taken := _expel(feed, still_open, epoch=epoch):
        for future_id in taken:
            past.open_jobs.pop(future_id)
            past.starts.pop(future_id, None)
        if journal is not None:
            journal.dropped(sorted(taken))
    if num_jobs:
        _log.warning("redis_refilled", num_batches=num_made_up, num_open_jobs=num_jobs)
    return num_made_up


def _made_by(record: LoggedRecord, entries: list[LogEntry]) -> int | None:
    """The seq of the job that made the model whose record this is."""
    jobs = [entry.job for entry in entries if entry.job.owner == record.record_id and is_creator(entry.job)]
    return jobs[-1].seq if record.kind is RecordKind.MODEL and jobs else None


_Frames = Iterable[tuple[LoggedBatch, list[LogEntry], list[Ended]]]


def _after(last: BatchId, past: Past) -> _Frames:
    for frame, batch in zip(past.frames, past.batches, strict=True):
        if frame.batch_id > last:
            entries = [_entry(job, is_open=False) for job in past.jobs_of[batch.batch]]
            yield frame, entries, list(batch.ended)


def _whole(log: DiskLog, last: BatchId | None) -> _Frames:
    """Every batch of the log after last whose jobs it still has, read one at a time."""
    jobs: dict[FutureId, LoggedJob] = {}
    for _, frame in log.scan():
        match frame:
            case LoggedJob():
                jobs.setdefault(frame.job.future_id, frame)
            case Dropped(future_ids=future_ids):
                for future_id in future_ids:
                    jobs.pop(future_id, None)
            case LoggedBatch():
                own = {outcome.future_id: jobs.pop(outcome.future_id, None) for outcome in frame.outcomes}
                if last is not None and frame.batch_id <= last:
                    continue
                ended = [
                    Ended(job=job.job, status=outcome.status, data=outcome.data, digest=outcome.digest)
                    for outcome in frame.outcomes
                    if (job := own[outcome.future_id]) is not None
                ]
                yield frame, [_entry(job, is_open=False) for job in own.values() if job is not None], ended
            case _:
                pass


def _give_back(feed: Feed, entries: list[LogEntry], *, epoch: int, ended_ms: int = 0) -> int:
    """Restore those jobs that Redis does not know; how many."""
    missing = feed.unknown([entry.job.future_id for entry in entries])
    lost = [entry for entry in entries if entry.job.future_id in missing]
    return sum(feed.restore(entry, epoch=epoch, ended_ms=ended_ms) for entry in lost)


def _expel(feed: Feed, entries: list[LogEntry], *, epoch: int) -> set[FutureId]:
    """Fail what Redis took under the seqs of these jobs; the futures."""
    taken = feed.expel(entries, epoch=epoch) if entries else set()
    if taken:
        _log.error("seqs_given_out_twice", futures=sorted(taken)[:20], num_jobs=len(taken))
    return taken


def _entry(job: LoggedJob, *, is_open: bool) -> LogEntry:
    return LogEntry(
        entry_id=job.entry_id,
        job=job.job,
        is_open=is_open,
        ordered=job.ordered,
        at_ms=job.at_ms,
        again=job.again,
        record=job.record,
    )


def _as_open(entry: LogEntry) -> LogEntry:
    """The entry as it was when a gang first read it."""
    return replace(entry, is_open=True, starts=0)


def _commit(frame: LoggedBatch, ended: list[Ended], *, epoch: int, storage: Storage | None) -> Commit:
    return Commit(
        epoch=epoch,
        number=0,
        batch=frame.batch_id,
        outcomes=ended,
        plan=codec.encode(frame.plan),
        cursor=frame.cursor,
        records=[write for record in frame.records if (write := _as_it_is_now(_write(record), storage)) is not None],
        at_ms=frame.at_ms,
    )


def _as_it_is_now(write: RecordWrite, storage: Storage | None) -> RecordWrite | None:
    """The record of a checkpoint as its manifest on disk tells, None when it is gone; any other record as it is."""
    if storage is None or write.kind is not RecordKind.CHECKPOINT or write.fields is None:
        return write
    try:
        manifest = storage.manifest(write.record_id)
    except UnknownModel:
        return None
    except StorageFailure as error:
        _log.warning("checkpoint_not_read", checkpoint=write.record_id, reason=error.message)
        return write
    return RecordWrite(kind=write.kind, record_id=write.record_id, fields=checkpoint_fields(manifest))


def _write(record: LoggedRecord) -> RecordWrite:
    return RecordWrite(kind=record.kind, record_id=record.record_id, fields=record.fields)
