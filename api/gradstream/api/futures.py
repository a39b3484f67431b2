"""Long polls: what a client hears when it asks for a future's outcome."""

import asyncio
import zlib
from dataclasses import dataclass
from enum import StrEnum

from gradstream.api.parts import Parts
from gradstream.shared import ids
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.joblog.keys import next_seq_field
from gradstream.shared.joblog.port import FutureStatus, FutureView, RecordKind

_RECOVERY_LOOK_S = 0.25


class QueueState(StrEnum):
    """What the tinker SDK tells its user about a wait."""

    ACTIVE = "active"
    PAUSED_CAPACITY = "paused_capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The stored outcome's bytes."""

    outcome: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The job is not done; reason says what it waits for, for a person to read."""

    state: QueueState
    reason: str | None


@dataclass(frozen=True, slots=True)
class Expired:
    """The future existed, but its result is no longer kept."""


@dataclass(frozen=True, slots=True)
class Missing:
    """There never was such a future, or it is another tenant's."""


async def poll(parts: Parts, future_id: FutureId, *, tenant: TenantId) -> Finished | Pending | Expired | Missing:
    """The future's outcome, as soon as it is there or the poll's time is over.

    What is not there is waited for while it may yet be restored.
    """
    deadline_s = parts.clock.monotonic_s() + _hold_s(parts, future_id)
    while True:
        start_s = parts.clock.monotonic_s()
        answer = await _look(parts, future_id, tenant=tenant)
        if not isinstance(answer, Missing | Expired):
            return answer
        if await parts.recovery.is_settled(start_s):
            return answer
        is_over = parts.clock.monotonic_s() >= deadline_s
        if is_over or await parts.parked.wait(asyncio.sleep(_RECOVERY_LOOK_S, result=True)) is None:
            return Pending(state=QueueState.PAUSED_CAPACITY, reason="the server is recovering; ask again")


async def _look(parts: Parts, future_id: FutureId, *, tenant: TenantId) -> Finished | Pending | Expired | Missing:
    with parts.metrics.polls_parked.track_inprogress():
        waiting = parts.intake.wait(future_id, tenant=tenant, timeout_s=_hold_s(parts, future_id))
        view = await parts.parked.wait(waiting)
    if view is None and parts.parked.is_stopping:
        # The wait ended early.
        view = await parts.intake.future(future_id)
    # One of another tenant goes the way of one that never was: how long the answer takes must not tell a stranger that there is one.
    if view is None or view.tenant != tenant:
        return Expired() if await _existed(parts, future_id, tenant=tenant) else Missing()
    match view.status:
        case FutureStatus.DONE | FutureStatus.FAILED:
            assert view.outcome is not None
            return Finished(outcome=view.outcome)
        case FutureStatus.HELD | FutureStatus.QUEUED:
            return await _pending(parts, view)


async def _pending(parts: Parts, view: FutureView) -> Pending:
    if view.status is FutureStatus.HELD:
        assert view.waiting_for_seq is not None
        awaited = ids.seq_text(view.waiting_for_seq)
        return Pending(
            state=QueueState.PAUSED_CAPACITY,
            reason=f"held until the request with seq_id {awaited} of the same model arrives",
        )
    if not await parts.intake.is_worker_alive():
        return Pending(state=QueueState.PAUSED_CAPACITY, reason="no worker is running now; the job waits in the queue")
    return Pending(state=QueueState.ACTIVE, reason=None)


def _hold_s(parts: Parts, future_id: FutureId) -> float:
    """The poll's length. The jitter follows from the id, so that polls that began together do not end together."""
    share = (zlib.crc32(future_id.encode()) & 0xFFFF) / 0x10000
    return parts.config.poll_hold_s + share * parts.config.poll_jitter_s


async def _existed(parts: Parts, future_id: FutureId, *, tenant: TenantId) -> bool:
    """True when the id's owner is known and has already passed the id's seq (a sampler's seqs are not counted)."""
    if not ids.is_valid_future_id(future_id):
        return False
    job = ids.future_parts(future_id)
    model = await parts.intake.record(RecordKind.MODEL, job.owner)
    if model is not None:
        return model.get("tenant") == tenant and job.seq < int(model.get(next_seq_field(job.seq), "0"))
    sampler = await parts.intake.record(RecordKind.SAMPLER, job.owner)
    return sampler is not None and sampler.get("tenant") == tenant
