"""The table of operations, by payload type."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from gradstream.engine.registry import Registry
from gradstream.engine.state import EngineState
from gradstream.shared.errors import GradstreamError
from gradstream.shared.wire import Done, Failed, Job, Outcome, Payload, Plan

P = TypeVar("P", bound=Payload)


@dataclass(frozen=True, slots=True)
class OpJob(Generic[P]):
    """A job with its payload decoded, and the plan of its batch."""

    job: Job
    payload: P
    plan: Plan


# Serves jobs of one payload type in order and returns one outcome for each, on every rank. A job's own error is its Failed
# outcome and leaves the state as it was; what is raised ends the process.
Op = Callable[[EngineState, Sequence[OpJob[P]]], list[Outcome]]


# Any: an op accepts the payload type that it is registered under, which a table's type cannot say.
OPS: Registry[type[Payload], Op[Any]] = Registry("op")


def each(serve: Callable[[EngineState, OpJob[P]], Done]) -> Op[P]:
    """An op that serves its jobs one by one; a GradstreamError becomes that job's outcome."""

    def op(state: EngineState, jobs: Sequence[OpJob[P]]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for job in jobs:
            try:
                outcomes.append(serve(state, job))
            except GradstreamError as error:
                outcomes.append(Failed.of(error))
        return outcomes

    return op
