"""A replay from its start to its end: which batches, from which snapshot, on which engine."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gradstream.engine.engine import Engine
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.clock import SystemClock
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.wire import Failed, RestoreSnapshot, RestoreSnapshotDone
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.execute import execute
from gradstream.worker.internal import internal_batch
from gradstream.worker.recovery.compare import exact, tolerant
from gradstream.worker.recovery.past import position_of
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.extent import (
    EARLIEST,
    Extent,
    Want,
    bounds_of,
    cuts_for,
    extent_from,
    problem_of,
    unlike,
)
from gradstream.worker.replaying.fingerprints import num_ranks
from gradstream.worker.replaying.overview import Overview, overview
from gradstream.worker.replaying.runner import Ran, Runner, past_batches
from gradstream.worker.replaying.scratch import Scratch
from gradstream.worker.replaying.source import Source, Where, engine_settings, open_source

_RESTORE = FutureId("replay:0")


@dataclass(slots=True, kw_only=True)
class Session:
    """An engine in the state after extent.cut, and the log from there on. remarks: what the user should know."""

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
        fingerprint = seen.fingerprint(seen.batches[bounds_of(seen, want).stop - 1])
        if want.tolerance is None and num_ranks(fingerprint) > 1:
            raise CannotReplay(_several_ranks(fingerprint))
        output_dir = Path(name) / "out"
        config = engine_settings(source, fingerprint=fingerprint, base_models=seen.base_models, output_dir=output_dir)
        engine = Engine.open(config, Comm.single())
        here = engine.card(epoch=0).fingerprint
        is_exact = want.tolerance is None
        extent = _begun(engine, source, seen, want, here)
        remarks = unlike(seen, extent, here)
        if seen.damage is not None:
            remarks.append(f"behind {seen.batches[-1].batch}, {seen.damage.message}")
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


def _begun(engine: Engine, source: Source, seen: Overview, want: Want, here: str) -> Extent:
    """The extent, with its cut restored in the engine, which has the fingerprint here. Raises CannotReplay."""
    bounds = bounds_of(seen, want)
    reasons: list[str] = []
    for cut in cuts_for(source, seen, want, bounds):
        extent = extent_from(seen, want, bounds, cut)
        reason = problem_of(extent)
        if reason is None and want.tolerance is None and (told := unlike(seen, extent, here)):
            reason = f"{told[0]}. A replay within a tolerance is possible: --tolerant 1e-3"
        if reason is None and cut is not None:
            reason = _restore(engine, source, extent)
        if reason is None:
            return extent
        reasons.append(reason)
    if not reasons:
        raise CannotReplay("no snapshot lies before what is to be run; use --from start")
    raise CannotReplay(reasons[0] if want.begin == EARLIEST else reasons[-1])


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
    try:
        outcome = execute(engine, internal_batch(payload, future_id=_RESTORE, epoch=0))[_RESTORE]
    except StorageFailure as error:
        return error.message
    if isinstance(outcome, Failed):
        return outcome.message
    assert isinstance(outcome, RestoreSnapshotDone)
    return next(iter(outcome.failed.values()), None)


def _several_ranks(fingerprint: str) -> str:
    return (
        f"the log was written by {num_ranks(fingerprint)} ranks, and a replay has one: their sums come out in another order. "
        "A replay within a tolerance is possible: --tolerant 1e-3"
    )
