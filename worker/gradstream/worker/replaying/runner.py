"""Runs batches of a log again on one engine, one after another."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from gradstream.engine.engine import Engine
from gradstream.shared import codec
from gradstream.shared.clock import Clock
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Ended, FutureStatus
from gradstream.shared.wire import Batch, Outcome, Sample
from gradstream.worker.disklog.frames import Frame, LoggedBatch
from gradstream.worker.execute import execute
from gradstream.worker.inspect.log_rows import JobEnd, JobPairer
from gradstream.worker.leader import REFUSED
from gradstream.worker.recovery.compare import Compare
from gradstream.worker.recovery.replay import PastBatch, again, divergences
from gradstream.worker.replaying.overview import SAMPLE, SAVES
from gradstream.worker.replaying.results import JobResult, job_results
from gradstream.worker.replaying.scratch import Scratch

Run = Callable[[Batch], Mapping[FutureId, Outcome]]

FAILED_THEN = "it had failed, and left the state as it was"
NO_ENGINE = "it had been answered without the engine"
NO_WEIGHTS = "its weights are not here"
_FILES = SAVES | {"load_weights"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A batch that was looked at: past as it was recorded, outcomes of what ran now, results of all its jobs."""

    past: PastBatch
    outcomes: Mapping[FutureId, Outcome]
    results: list[JobResult]


@dataclass(slots=True, kw_only=True)
class Runner:
    """Repeats batches. watch is called with each batch right before it runs and may run it itself; None: the engine does."""

    engine: Engine
    scratch: Scratch
    compare: Compare
    clock: Clock
    only_saved_samples: bool = False
    watch: Callable[[PastBatch, Batch, Run], Mapping[FutureId, Outcome]] | None = None
    _number: int = field(default=0, init=False)

    def repeat(self, frame: LoggedBatch, past: PastBatch) -> Ran:
        """Run a batch as its plan says, compare, and give its saves the times that they had. Raises CannotReplay."""
        wrong = self.scratch.prepare(past)
        todo, not_run = self._todo(past)
        start_s = self.clock.monotonic_s()
        outcomes = dict(self._outcomes(past, todo))
        ms = 1000 * (self.clock.monotonic_s() - start_s)
        self.scratch.settle(frame, outcomes)
        ran = replace(past, ended=[ended for ended in past.ended if ended.job.future_id in outcomes])
        found = divergences(ran, outcomes, self.compare)
        results = job_results(past, outcomes, found, wrong=wrong, not_run=not_run, ms=ms)
        return Ran(past=past, outcomes=outcomes, results=results)

    def _todo(self, past: PastBatch) -> tuple[list[Ended], str]:
        """The jobs that are run, and why the others are not."""
        ended = list(past.ended)
        if past.plan.kind in _FILES:
            # Whether a name is free or a disk is full depends on what the log does not hold.
            return [one for one in ended if _is_done(one)], FAILED_THEN
        if past.plan.kind == SAMPLE:
            return [one for one in ended if self._has_weights(one)], NO_WEIGHTS
        return ended, NO_ENGINE

    def _has_weights(self, ended: Ended) -> bool:
        try:
            payload = codec.decode_payload(ended.job.payload)
        except InvalidRequest:
            return True
        if not isinstance(payload, Sample) or payload.path is None:
            return not self.only_saved_samples
        if self.only_saved_samples:
            return self.scratch.was_saved(payload.path)
        return self.scratch.has(payload.path)

    def _outcomes(self, past: PastBatch, todo: list[Ended]) -> Mapping[FutureId, Outcome]:
        if past.plan.kind == REFUSED:
            repeated = {ended.job.future_id: self.scratch.repeat(ended.job) for ended in todo if _is_done(ended)}
            return {future_id: outcome for future_id, outcome in repeated.items() if outcome is not None}
        if not todo:
            return {}
        self._number += 1
        plan = msgspec.structs.replace(past.plan, future_ids=[ended.job.future_id for ended in todo])
        batch = again(replace(past, plan=plan, ended=todo), number=self._number, epoch=past.batch.epoch)
        return self._run(batch) if self.watch is None else self.watch(past, batch, self._run)

    def _run(self, batch: Batch) -> dict[FutureId, Outcome]:
        return execute(self.engine, batch)


def past_batches(
    frames: Iterable[Frame], *, after: BatchId | None, last: BatchId
) -> Iterator[tuple[LoggedBatch, PastBatch]]:
    """The batches behind one and up to another, with those of their jobs that the log still has."""
    pairer = JobPairer()
    for frame in frames:
        ended = pairer.take(frame)
        if not isinstance(frame, LoggedBatch):
            continue
        if frame.batch_id > last:
            return
        if after is None or frame.batch_id > after:
            yield frame, _past(frame, ended)
        if frame.batch_id == last:
            return


def _past(frame: LoggedBatch, ended: Iterable[JobEnd]) -> PastBatch:
    return PastBatch(
        batch=frame.batch_id,
        plan=frame.plan,
        ended=[
            Ended(job=one.job.job, status=one.outcome.status, data=one.outcome.data, digest=one.outcome.digest)
            for one in ended
            if one.job is not None and one.outcome is not None
        ],
        sources=frame.sources,
        elapsed_ms=frame.elapsed_ms,
    )


def _is_done(ended: Ended) -> bool:
    return ended.status is FutureStatus.DONE
