"""A replay from its start to its end: which batches, from which snapshot, on which engine."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gradstream.engine.engine import Engine
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.snapshot.cut import Cut
from gradstream.shared import codec
from gradstream.shared.clock import SystemClock
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.wire import Batch, Failed, Job, Plan, RestoreSnapshot, RestoreSnapshotDone
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.execute import execute
from gradstream.worker.inspect.log_source import batch_id
from gradstream.worker.recovery.compare import exact, tolerant
from gradstream.worker.recovery.past import position_of
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.fingerprints import differences, num_ranks
from gradstream.worker.replaying.overview import SAMPLE, Note, Overview, is_run, overview
from gradstream.worker.replaying.runner import Ran, Runner, past_batches
from gradstream.worker.replaying.scratch import Scratch
from gradstream.worker.replaying.source import Source, Where, engine_settings, open_source

START, SNAPSHOT = "start", "snapshot"
_RESTORE = FutureId("replay:0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What to run. to: a job or a batch, None for the end of the log. model None: all models.

    begin: "start", "snapshot" (the newest that serves), a batch with a snapshot, or None for snapshot if there is one. also: jobs or
    batches that must be run too. tolerance: None compares every byte. stop_at_all_samples: samples are run and compared.
    """

    to: str | None = None
    model: str | None = None
    begin: str | None = None
    also: Sequence[str] = ()
    tolerance: float | None = None
    samples: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What of a log is run: the batches behind a cut (None: from the start) up to last, of these owners (None: of all)."""

    cut: Cut | None
    notes: Sequence[Note]
    last: BatchId
    owners: frozenset[str] | None
    samples: bool


@dataclass(slots=True, kw_only=True)
class Session:
    """An engine in the state after extent.cut, and the log from there on. notes: what the user should know."""

    source: Source
    seen: Overview
    want: Want
    extent: Extent
    runner: Runner
    fingerprint: str
    remarks: list[str] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.runner.engine

    def run(self) -> Iterator[Ran]:
        """Run the batches of the extent in order. Raises CannotReplay, LogDamaged."""
        chosen = {note.batch for note in self.extent.notes}
        cut = self.extent.cut
        start, after = (None, None) if cut is None else (position_of(cut), BatchId(*cut.id))
        try:
            frames = (frame for _, frame in self.source.log.scan(start))
            for frame, past in past_batches(frames, after=after, last=self.extent.last):
                if past.batch in chosen:
                    yield self.runner.repeat(frame, past)
        except UnknownPosition as error:
            raise CannotReplay(f"the log was trimmed while it was read ({error}); try again") from error


@contextmanager
def open_session(where: Where, want: Want) -> Iterator[Session]:
    """Everything up to the first batch. Raises CannotReplay, CannotLook, ConfigError, LogDamaged, Unsupported."""
    with (
        tempfile.TemporaryDirectory(prefix="gradstream-replay-") as name,
        open_source(where, scratch=Path(name)) as source,
    ):
        seen = overview(source.log)
        bounds = _bounds(seen, want)
        fingerprint = seen.fingerprint(seen.batches[bounds.stop - 1])
        if want.tolerance is None and num_ranks(fingerprint) > 1:
            raise CannotReplay(_several_ranks(fingerprint))
        output_dir = Path(name) / "out"
        config = engine_settings(source, fingerprint=fingerprint, base_models=seen.base_models, output_dir=output_dir)
        engine = Engine.open(config, Comm.single())
        here = engine.card(epoch=0).fingerprint
        is_exact = want.tolerance is None
        extent = _begun(engine, source, seen, want, bounds)
        remarks = _remarks(seen, extent, here, is_exact=is_exact)
        runner = Runner(
            engine=engine,
            scratch=Scratch(output_dir, original=source.checkpoints, compares=is_exact),
            compare=exact if want.tolerance is None else tolerant(want.tolerance),
            clock=SystemClock(),
            only_saved_samples=want.model is not None,
        )
        yield Session(
            source=source, seen=seen, want=want, extent=extent, runner=runner, fingerprint=here, remarks=remarks
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bounds:
    """Places in the overview: first must be run, stop is behind the last one."""

    first: int
    stop: int


def _bounds(seen: Overview, want: Want) -> _Bounds:
    """Where the replay ends, and the first batch that must be part of it. Raises CannotReplay."""
    also = [seen.find(text) for text in want.also]
    if want.to is not None:
        last = seen.find(want.to)
        if beyond := [text for text, place in zip(want.also, also, strict=True) if place > last]:
            raise CannotReplay(f"{beyond[0]}: comes after {want.to}, where the replay ends")
    else:
        runs = [
            place
            for place, note in enumerate(seen.batches)
            if is_run(note, samples=want.samples) and (want.model is None or want.model in note.owners)
        ]
        if not runs:
            raise CannotReplay(_nothing(seen, want))
        last = max(runs)
    return _Bounds(first=min([last, *also]), stop=last + 1)


def _nothing(seen: Overview, want: Want) -> str:
    if seen.damage is not None:
        return seen.damage.message
    return (
        "no batch in this log trains" if want.model is None else f"--model: no job of {want.model} was done in this log"
    )


def _begun(engine: Engine, source: Source, seen: Overview, want: Want, bounds: _Bounds) -> Extent:
    """The extent, with its cut restored in the engine. Raises CannotReplay."""
    for cut in _cuts(source, seen, want, bounds):
        extent = _extent(seen, want, bounds, cut)
        reason = _problem(extent) or (None if cut is None else _restore(engine, source, extent))
        if reason is None:
            return extent
        if cut is None or want.begin not in (None, SNAPSHOT):
            raise CannotReplay(reason)
    if want.begin == SNAPSHOT:
        raise CannotReplay("no snapshot lies before what is to be run and is whole; use --from start")
    raise AssertionError("the start of the log is tried last")


def _cuts(source: Source, seen: Overview, want: Want, bounds: _Bounds) -> Iterator[Cut | None]:
    """Where to begin, the best place first; None is the start of the log."""
    if want.begin == START:
        yield None
        return
    named = None if want.begin in (None, SNAPSHOT) else batch_id(want.begin)
    if want.begin not in (None, SNAPSHOT) and named is None:
        raise CannotReplay(f"--from: {want.begin!r} is neither start nor snapshot nor a batch such as 3-17")
    if want.begin is not None and source.snapshots is None:
        raise CannotReplay("--from: an exported log has no snapshots; use --from start")
    before = seen.batches[bounds.first].batch
    known = {note.batch for note in seen.batches}
    if source.snapshots is not None:
        for cut in source.snapshots.cuts():
            here = BatchId(*cut.id)
            if here < before and here in known and (named is None or here == named) and _is_on(source, cut):
                yield cut
    if named is not None:
        raise CannotReplay(
            f"--from: no snapshot after batch {named} lies on this log before {before}; `gradstream snapshots` lists them"
        )
    if want.begin is None:
        yield None


def _is_on(source: Source, cut: Cut) -> bool:
    """True when the log goes on from the cut."""
    try:
        return next(source.log.scan(position_of(cut)), None) is not None
    except UnknownPosition:
        return False


def _extent(seen: Overview, want: Want, bounds: _Bounds, cut: Cut | None) -> Extent:
    """What is run when the replay begins at cut. Raises CannotReplay when the model has no job there."""
    notes = [
        note
        for note in seen.batches[: bounds.stop]
        if (cut is None or note.batch > BatchId(*cut.id)) and is_run(note, samples=want.samples)
    ]
    owners = None if want.model is None else seen.needed(want.model, notes)
    if owners is not None:
        notes = [note for note in notes if note.kind == SAMPLE or note.owners & owners or _is_failed_of(note, owners)]
    return Extent(cut=cut, notes=notes, last=seen.batches[bounds.stop - 1].batch, owners=owners, samples=want.samples)


def _is_failed_of(note: Note, owners: frozenset[str]) -> bool:
    """True for a batch in which nothing was done and a job of one of the owners failed."""
    return not note.owners and any(future.rpartition(":")[0] in owners for future in note.futures)


def _problem(extent: Extent) -> str | None:
    """Why the extent cannot be run: it begins after a model was made, or an export left out jobs; None when it can be."""
    alive = set() if extent.cut is None else {str(model) for model in extent.cut.models}
    for note in extent.notes:
        if note.kind in (SAMPLE, "refused"):
            continue
        alive |= note.makes
        if missing := sorted(note.owners - alive):
            where = "the log" if extent.cut is None else "this snapshot"
            return (
                f"{where} begins too late: {missing[0]} trains in batch {note.batch} and was made before. Begin at a snapshot, "
                "export the log from its start, or name another model with --model"
            )
    return None


def _restore(engine: Engine, source: Source, extent: Extent) -> str | None:
    """Put the cut's models into the engine; why that cannot be, None when it is done."""
    cut = extent.cut
    assert cut is not None
    assert source.snapshots is not None
    models = [model for model in cut.models if extent.owners is None or model in extent.owners]
    payload = RestoreSnapshot(
        directory=str(source.snapshots.directory),
        epoch=cut.head.epoch,
        number=cut.head.number,
        model_ids=models,
        drop_others=True,
    )
    job = Job(
        future_id=_RESTORE,
        owner=ModelId("replay"),
        seq=0,
        op=codec.op_of(payload),
        tenant=LOCAL_TENANT,
        payload=codec.encode(payload),
    )
    plan = Plan(kind=job.op, future_ids=[_RESTORE], row_budget_tokens=1)
    try:
        outcome = execute(engine, Batch(number=0, epoch=0, plan=plan, jobs=[job]))[_RESTORE]
    except StorageFailure as error:
        return error.message
    if isinstance(outcome, Failed):
        return outcome.message
    assert isinstance(outcome, RestoreSnapshotDone)
    return next(iter(outcome.failed.values()), None)


def _remarks(seen: Overview, extent: Extent, here: str, *, is_exact: bool) -> list[str]:
    """What the user should know of the replay. Raises CannotReplay when an exact one cannot be had."""
    remarks = []
    for text in dict.fromkeys(seen.fingerprint(note) for note in extent.notes):
        if found := differences(text, here):
            message = f"the log was written by another kind of engine, and bits may differ: {'; '.join(found)}"
            if is_exact:
                raise CannotReplay(f"{message}. A replay within a tolerance is possible: --tolerant 1e-3")
            remarks.append(message)
    if partial := [note for note in extent.notes if note.is_partial]:
        message = f"{len(partial)} batches, first {partial[0].batch}, lack jobs that this export left out"
        if is_exact:
            raise CannotReplay(
                f"{message}, and bits depend on them. Export with --with-neighbours, or replay within a tolerance: --tolerant 1e-3"
            )
        remarks.append(message)
    if seen.damage is not None:
        remarks.append(f"behind {seen.batches[-1].batch}, {seen.damage.message}")
    return remarks


def _several_ranks(fingerprint: str) -> str:
    return (
        f"the log was written by {num_ranks(fingerprint)} ranks, and a replay has one: their sums come out in another order. "
        "A replay within a tolerance is possible: --tolerant 1e-3"
    )
