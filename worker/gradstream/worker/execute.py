"""One batch through the engine: the outcomes that it gave."""

from collections.abc import Mapping
from typing import Protocol

from gradstream.shared.errors import GradstreamError, OutOfMemory
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Batch, Failed, Outcome
from gradstream.worker.fairness import Lane, lane_of


class Executor(Protocol):
    """What the gang needs of the engine (`gradstream.engine.engine.Engine`)."""

    def execute(self, batch: Batch) -> dict[FutureId, Outcome]:
        """The outcome of each job; of a batch of samples those of the samples that ended, be they of this batch or of an earlier one.

        Collective: every rank calls it with the same batch; what it returns on rank 0 counts.
        """
        ...


def execute(engine: Executor, batch: Batch) -> dict[FutureId, Outcome]:
    """The outcomes that the batch gave.

    A GradstreamError of a whole batch of training (which every rank raises alike) fails each of its jobs. Every other exception
    propagates: the engine's state cannot be trusted after it, so the process must end.
    """
    if lane_of(batch.plan.kind) is Lane.SAMPLE:
        return engine.execute(batch)
    try:
        outcomes = engine.execute(batch)
    except GradstreamError as error:
        return {job.future_id: Failed.of(error) for job in batch.jobs}
    assert outcomes.keys() == {job.future_id for job in batch.jobs}, (
        f"{len(outcomes)} outcomes for {len(batch.jobs)} jobs"
    )
    return outcomes


def lacked_room_together(batch: Batch, outcomes: Mapping[FutureId, Outcome]) -> bool:
    """True when several jobs failed for want of memory and none was done: one alone may have room, and no model has changed.

    Never of samples: each fails only when it had no room alone, and those that failed may be of earlier batches.
    """
    if lane_of(batch.plan.kind) is Lane.SAMPLE:
        return False
    failed = [outcome.code for outcome in outcomes.values() if isinstance(outcome, Failed)]
    return len(failed) == len(batch.jobs) == len(outcomes) and failed.count(OutOfMemory.code) > 1
