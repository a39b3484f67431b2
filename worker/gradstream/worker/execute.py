"""One batch through the engine: as many outcomes as jobs."""

from typing import Protocol

from gradstream.shared.errors import GradstreamError
from gradstream.shared.wire import Batch, Outcome
from gradstream.worker.models import failure


class Executor(Protocol):
    """What the gang needs of the engine (`gradstream.engine.engine.Engine`)."""

    def execute(self, batch: Batch) -> list[Outcome]:
        """The outcome of each job. Collective: every rank calls it with the same batch; that of rank 0 counts."""
        ...


def execute(engine: Executor, batch: Batch) -> list[Outcome]:
    """The outcome of each job, in the batch's order.

    A GradstreamError of the whole batch (which every rank raises alike) fails each of its jobs. Every other exception propagates:
    the engine's state cannot be trusted after it, so the process must end.
    """
    try:
        outcomes = engine.execute(batch)
    except GradstreamError as error:
        return [failure(error) for _ in batch.jobs]
    assert len(outcomes) == len(batch.jobs), f"{len(outcomes)} outcomes for {len(batch.jobs)} jobs"
    return outcomes
