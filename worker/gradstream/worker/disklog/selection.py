"""Which frames of a log belong to some models and a range of batches."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from gradstream.shared.ids import FutureId, future_parts
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.wire import Sample
from gradstream.worker.disklog.frames import (
    Dropped,
    Frame,
    LoggedBatch,
    LoggedJob,
    LoggedRecord,
    SegmentHead,
    Started,
    Stopped,
)

_SAMPLE_KIND = Sample.__struct_config__.tag


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to take from a log.

    owners: models and samplers, None for all. start and stop: first and last batch, both included. with_neighbours: also every owner
    whose jobs ran in one batch with theirs, and those whose jobs ran with these, and so on: all that a replay with the same bits needs
    when batches are shared. Without it such batches lose the others' jobs and outcomes and are marked partial. Samples do not count as
    shared: their answers depend on nothing else.
    """

    owners: Collection[str] | None = None
    start: BatchId | None = None
    stop: BatchId | None = None
    with_neighbours: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A choice made concrete for one log. owners: None for all. last: the last batch. jobs: those that are taken and in the log."""

    owners: frozenset[str] | None
    start: BatchId | None
    last: BatchId | None
    jobs: frozenset[FutureId]
    num_batches: int
    num_partial: int


def owner_of(future_id: FutureId) -> str:
    """The model or sampler in a future's id."""
    return future_parts(future_id).owner


def members_of(batch: LoggedBatch) -> frozenset[FutureId]:
    """The jobs that ran in a batch or ended with it."""
    return frozenset((*batch.plan.future_ids, *(outcome.future_id for outcome in batch.outcomes)))


def survey(frames: Iterable[Frame], choice: Choice) -> Taken:
    """What choice takes from the frames of a log; of those behind choice.stop, none is looked at.

    With no stop, open jobs are taken too.
    """
    logged: dict[FutureId, None] = {}
    batches: list[frozenset[FutureId]] = []
    shared: set[frozenset[str]] = set()
    last: BatchId | None = None
    for frame in up_to(frames, choice.stop):
        match frame:
            case LoggedJob():
                logged[frame.job.future_id] = None
            case Dropped():
                for future_id in frame.future_ids:
                    logged.pop(future_id, None)
            case LoggedBatch():
                last = frame.batch_id
                if choice.start is None or last >= choice.start:
                    batches.append(members_of(frame))
                    if frame.plan.kind != _SAMPLE_KIND:
                        shared.add(frozenset(map(owner_of, batches[-1])))
                else:
                    for outcome in frame.outcomes:
                        logged.pop(outcome.future_id, None)
            case _:
                pass
    owners = None if choice.owners is None else frozenset(choice.owners)
    if owners is not None and choice.with_neighbours:
        owners = _closed(owners, shared)
    return _taken(choice, owners, logged=logged, batches=batches, last=last)


def selected(frames: Iterable[Frame], taken: Taken) -> Iterator[Frame]:
    """The frames that are taken. The head of a segment comes only with a frame that follows it there."""
    head: SegmentHead | None = None
    for frame in up_to(frames, taken.last):
        if isinstance(frame, SegmentHead):
            head = frame
            continue
        kept = _kept(frame, taken)
        if kept is not None:
            if head is not None:
                yield head
                head = None
            yield kept


def up_to(frames: Iterable[Frame], last: BatchId | None) -> Iterator[Frame]:
    """The frames as far as a batch, or all. What follows it is not read."""
    for frame in frames:
        if last is not None and isinstance(frame, LoggedBatch) and frame.batch_id > last:
            return
        yield frame
        if last is not None and isinstance(frame, LoggedBatch) and frame.batch_id == last:
            return


def _closed(owners: frozenset[str], shared: set[frozenset[str]]) -> frozenset[str]:
    """The owners and everybody who is linked to them by groups that shared a batch."""
    while (wider := owners.union(*(group for group in shared if group & owners))) != owners:
        owners = wider
    return owners


def _taken(
    choice: Choice,
    owners: frozenset[str] | None,
    *,
    logged: Collection[FutureId],
    batches: Sequence[frozenset[FutureId]],
    last: BatchId | None,
) -> Taken:
    members = {future_id for batch in batches for future_id in batch}
    is_open_ended = choice.stop is None
    jobs = frozenset(
        future_id
        for future_id in logged
        if (owners is None or owner_of(future_id) in owners) and (is_open_ended or future_id in members)
    )
    hit = [batch for batch in batches if owners is None or any(owner_of(future_id) in owners for future_id in batch)]
    return Taken(
        owners=owners,
        start=choice.start,
        last=last,
        jobs=jobs,
        num_batches=len(hit),
        num_partial=sum(not jobs.issuperset(batch) for batch in hit),
    )


def _kept(frame: Frame, taken: Taken) -> Frame | None:
    """The frame as far as it is taken, None when it is not."""
    match frame:
        case LoggedJob():
            return frame if frame.job.future_id in taken.jobs else None
        case Started() | Stopped() | Dropped():
            future_ids = [future_id for future_id in frame.future_ids if future_id in taken.jobs]
            return msgspec.structs.replace(frame, future_ids=future_ids) if future_ids else None
        case LoggedBatch():
            return _kept_batch(frame, taken)
        case SegmentHead():
            return frame


def _kept_batch(batch: LoggedBatch, taken: Taken) -> LoggedBatch | None:
    if taken.start is not None and batch.batch_id < taken.start:
        return None
    is_partial = batch.partial or not taken.jobs.issuperset(members_of(batch))
    owners = taken.owners
    if owners is None:
        return msgspec.structs.replace(batch, partial=is_partial)
    if not any(owner_of(future_id) in owners for future_id in members_of(batch)):
        return None
    return msgspec.structs.replace(
        batch,
        partial=is_partial,
        outcomes=[outcome for outcome in batch.outcomes if owner_of(outcome.future_id) in owners],
        records=[record for record in batch.records if _belongs(record, owners)],
        sources={future: digest for future, digest in batch.sources.items() if owner_of(future) in owners},
    )


def _belongs(record: LoggedRecord, owners: Collection[str]) -> bool:
    """True when a record describes one of the owners, or a checkpoint or sampler of one."""
    model = (record.fields or {}).get("model")
    return (
        record.record_id in owners
        or model in owners
        or any(record.record_id.startswith(f"tinker://{owner}/") for owner in owners)
    )
