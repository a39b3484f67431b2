"""Runs journaled batches again, each with the plan that it had, and compares what they give with what they gave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from gradstream.shared import codec
from gradstream.shared.errors import OutOfMemory, StorageFailure, StorageLimit
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, Ended, FutureStatus
from gradstream.shared.wire import Batch, CreateModel, CreateModelDone, Failed, Job, Outcome, Plan
from gradstream.worker.recovery.compare import Compare

# Plans that change training state. What others did is on disk, in Redis, or over.
STATEFUL = frozenset(
    {
        "create_model",
        "load_weights",
        "forward_backward",
        "optim_step",
        "reset_model",
        "offload_model",
        "unload_model",
    }
)
_NO_ROOM = frozenset({StorageFailure.code, StorageLimit.code, OutOfMemory.code})


@dataclass(frozen=True, slots=True, kw_only=True)
class PastBatch:
    """A batch of the journal with its jobs. sources: by future, the digest of the checkpoint that a load_weights read.

    at_ms: when it ended. fingerprint: of the engine that ran it, empty where that is not known.
    """

    batch: BatchId
    plan: Plan
    ended: Sequence[Ended]
    sources: Mapping[FutureId, str]
    at_ms: int = 0
    elapsed_ms: float = 0.0
    fingerprint: str = ""

    @property
    def is_stateful(self) -> bool:
        return self.plan.kind in STATEFUL


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A job that gave something else than it had given."""

    batch: BatchId
    job: Job
    what: str

    @property
    def message(self) -> str:
        return f"in batch {self.batch}, {self.job.op} seq {self.job.seq}: {self.what}"


def repeatable(past: PastBatch) -> PastBatch:
    """What a batch did to the models, without what it left on disk, which lies there or was removed or replaced since.

    Jobs that failed for want of disk or memory, which may be there now, changed no model and are left out.
    """
    ended = [_unsaved(one) for one in past.ended if not _lacked_room(one)]
    if len(ended) == len(past.ended) and past.plan.kind != "create_model":
        return past
    plan = msgspec.structs.replace(past.plan, future_ids=[one.job.future_id for one in ended])
    return replace(past, plan=plan, ended=ended)


def _lacked_room(ended: Ended) -> bool:
    if ended.status is FutureStatus.DONE:
        return False
    outcome = codec.decode_outcome(ended.data)
    return isinstance(outcome, Failed) and outcome.code in _NO_ROOM


def _unsaved(ended: Ended) -> Ended:
    if ended.job.op != "create_model" or ended.status is not FutureStatus.DONE:
        return ended
    payload, outcome = codec.decode_payload(ended.job.payload), codec.decode_outcome(ended.data)
    if not isinstance(payload, CreateModel) or not isinstance(outcome, CreateModelDone) or payload.save_as is None:
        return ended
    data = codec.encode(msgspec.structs.replace(payload, save_as=None))
    return Ended.of(msgspec.structs.replace(ended.job, payload=data), msgspec.structs.replace(outcome, path=None))


def again(past: PastBatch, *, number: int, epoch: int) -> Batch:
    """The batch as the gang runs it now."""
    return Batch(number=number, epoch=epoch, plan=past.plan, jobs=[ended.job for ended in past.ended])


def divergences(past: PastBatch, outcomes: Mapping[FutureId, Outcome], compare: Compare) -> list[Divergence]:
    """The jobs of a replayed batch whose outcomes differ from the recorded ones, in the batch's order."""
    found = []
    for ended in past.ended:
        given = outcomes[ended.job.future_id]
        if (what := compare(ended.data, given)) is not None:
            found.append(Divergence(batch=past.batch, job=ended.job, what=what))
    return found


def replay(
    batches: Sequence[PastBatch],
    run: Callable[[Batch], Mapping[FutureId, Outcome]],
    *,
    compare: Compare,
    epoch: int,
    refuse: Callable[[PastBatch], str | None] | None = None,
) -> list[Divergence]:
    """Run what changes training state, in order; every job that diverged.

    refuse is asked ahead of each batch, and may say why it cannot be run: then all its jobs diverged. What run raises ends the replay.
    """
    found: list[Divergence] = []
    for number, past in enumerate(batches, start=1):
        if not past.is_stateful or not any(ended.status is FutureStatus.DONE for ended in past.ended):
            continue
        if refuse is not None and (reason := refuse(past)) is not None:
            found += [Divergence(batch=past.batch, job=ended.job, what=reason) for ended in past.ended]
        else:
            todo = repeatable(past)
            found += divergences(todo, run(again(todo, number=number, epoch=epoch)), compare)
    return found
