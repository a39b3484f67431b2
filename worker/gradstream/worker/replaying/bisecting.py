"""The first job of a log at which a condition holds, by a scan of what was recorded or by a replay."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from gradstream.engine.snapshot.capture import capture
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.inspect.describe import Plain
from gradstream.worker.inspect.log_rows import BatchRow, Wanted, batch_row, batches_in
from gradstream.worker.inspect.log_show import find_job
from gradstream.worker.replaying.conditions import Condition, Event, State
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.extent import EARLIEST, Want
from gradstream.worker.replaying.overview import Overview, overview
from gradstream.worker.replaying.runner import Ran, past_batches
from gradstream.worker.replaying.session import Session, open_session
from gradstream.worker.replaying.source import Source, Where, open_source


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. what: in words. job: all that the log knows of it. before, after: the model's batches next to the job's.

    replayed_from: the batch of the snapshot that a replay began after, "start" for the start of the log, None for a scan alone.
    num_jobs: how many were looked at.
    """

    condition: str
    found: bool
    num_jobs: int
    replayed_from: str | None = None
    future_id: str | None = None
    batch: str | None = None
    what: str | None = None
    job: dict[str, Plain] | None = None
    before: BatchRow | None = None
    after: BatchRow | None = None
    remarks: list[str] = []
    is_cut_short: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """The first event at which a condition holds, or none among so many."""

    num_jobs: int
    event: Event | None = None
    what: str = ""


def first(events: Iterator[Event], condition: Condition, *, model: str | None) -> Hit:
    """The first event of the model (None: of any) at which the condition holds."""
    num_jobs = 0
    for event in events:
        if model is None or event.ended.job.owner == model:
            num_jobs += 1
            if (what := condition.holds(event)) is not None:
                return Hit(num_jobs=num_jobs, event=event, what=what)
    return Hit(num_jobs=num_jobs)


def bisect(where: Where, want: Want, condition: Condition, *, goes_on: bool, scan: Condition | None = None) -> Finding:
    """The first job of want's part of the log at which the condition holds.

    goes_on: once it holds of a model's state it holds on, so what comes before the newest snapshot where it does not is not
    replayed. scan: the part of the condition that is about records; they are looked through first, and only what lies before a hit
    is replayed. Raises CannotReplay, CannotLook, ConfigError, LogDamaged.
    """
    if condition.needs == "record":
        return _scan(where, want, condition)
    scanned = None if scan is None else _scan(where, want, scan)
    if scanned is not None and scanned.found:
        want = replace(want, to=scanned.future_id)
    try:
        begin = _begin(where, want, condition) if goes_on else None
        return _replay(where, replace(want, begin=want.begin or begin or EARLIEST), condition)
    except CannotReplay as error:
        if scanned is None or not scanned.found:
            raise
        return msgspec.structs.replace(scanned, remarks=[f"models before this job were not looked at: {error}"])


def _scan(where: Where, want: Want, condition: Condition) -> Finding:
    with opened(where) as source:
        seen = overview(source.log)
        hit = first(recorded_events(source.log, _last(seen, want)), condition, model=want.model)
        found = _finding(condition, source.log, hit, replayed_from=None)
        return msgspec.structs.replace(found, is_cut_short=_is_cut_short(seen, want))


def _replay(where: Where, want: Want, condition: Condition) -> Finding:
    with open_session(where, want) as session:
        hit = first(replayed_events(session, with_state=condition.needs == "state"), condition, model=want.model)
        cut = session.extent.cut
        begin = "start" if cut is None else str(BatchId(*cut.id))
        found = _finding(condition, session.source.log, hit, replayed_from=begin)
        return msgspec.structs.replace(found, remarks=session.remarks, is_cut_short=_is_cut_short(session.seen, want))


def _is_cut_short(seen: Overview, want: Want) -> bool:
    """True when damage keeps jobs that were asked for from being looked at."""
    return seen.damage is not None and want.to is None


@contextmanager
def opened(where: Where) -> Iterator[Source]:
    """The log that is meant, for as long as the block lasts."""
    with tempfile.TemporaryDirectory(prefix="gradstream-bisect-") as name, open_source(where, scratch=Path(name)) as it:
        yield it


def recorded_events(log: DiskLog, last: BatchId) -> Iterator[Event]:
    """Every job that ended, as it was recorded."""
    frames = (frame for _, frame in log.scan())
    for _, past in past_batches(frames, after=None, last=last):
        for ended in past.ended:
            yield Event(batch=past.batch, kind=past.plan.kind, ended=ended)


def replayed_events(session: Session, *, with_state: bool) -> Iterator[Event]:
    """Every job that is run again, with its model's state after its batch."""
    for ran in session.run():
        states = _states(session, ran) if with_state else {}
        for ended, result in zip(ran.past.ended, ran.results, strict=True):
            yield Event(
                batch=ran.past.batch,
                kind=ran.past.plan.kind,
                ended=ended,
                result=result,
                state=states.get(ended.job.owner),
            )


def _states(session: Session, ran: Ran) -> dict[str, State]:
    held = session.engine.state.models
    owners = {ModelId(ended.job.owner) for ended in ran.past.ended} & set(held)
    return {model.model_id: model.tensors for model in capture(session.engine.state, owners)}


def _last(seen: Overview, want: Want) -> BatchId:
    if not seen.batches:
        raise CannotReplay("no job of this log has an outcome" if seen.damage is None else seen.damage.message)
    return seen.batches[-1 if want.to is None else seen.find(want.to)].batch


def _begin(where: Where, want: Want, condition: Condition) -> str | None:
    """The newest snapshot in which the condition does not hold yet, when the user did not say where to begin."""
    if want.begin is not None or condition.in_state is None:
        return None
    with opened(where) as source:
        seen = overview(source.log)
        last = _last(seen, want)
        if source.snapshots is None:
            return None
        known = {note.batch for note in seen.batches}
        for cut in source.snapshots.cuts():
            batch = BatchId(*cut.id)
            if batch < last and batch in known and not _holds_in(source, condition, batch, want.model):
                return str(batch)
    return None


def _holds_in(source: Source, condition: Condition, batch: BatchId, model: str | None) -> bool:
    assert source.snapshots is not None
    assert condition.in_state is not None
    cut = source.snapshots.find((batch.epoch, batch.number))
    models = [one for one in cut.models if model is None or one == model]
    source.snapshots.verify(cut, models)
    return any(condition.in_state(one, source.snapshots.read(cut, one).tensors) is not None for one in models)


def _finding(condition: Condition, log: DiskLog, hit: Hit, *, replayed_from: str | None) -> Finding:
    event = hit.event
    if event is None:
        return Finding(condition=condition.name, found=False, num_jobs=hit.num_jobs, replayed_from=replayed_from)
    shown = find_job((frame for _, frame in log.scan()), event.ended.job.future_id)
    before, after = _neighbours(log, event)
    return Finding(
        condition=condition.name,
        found=True,
        num_jobs=hit.num_jobs,
        replayed_from=replayed_from,
        future_id=event.ended.job.future_id,
        batch=str(event.batch),
        what=hit.what,
        job=None if shown is None else shown.shown,
        before=before,
        after=after,
    )


def _neighbours(log: DiskLog, event: Event) -> Sequence[BatchRow | None]:
    """The model's batches before and after the event's."""
    before = None
    wanted = Wanted(model=event.ended.job.owner)
    for batch, ended in batches_in((frame for _, frame in log.scan()), wanted):
        if batch.batch_id > event.batch:
            return before, batch_row(batch, ended)
        if batch.batch_id < event.batch:
            before = batch_row(batch, ended)
    return before, None
