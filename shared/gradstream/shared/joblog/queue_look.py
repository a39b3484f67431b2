"""What one look at the queue tells: plain values, which `gradstream queue --json` prints as they are."""

import msgspec

from gradstream.shared.ids import FutureId, ModelId, TenantId


class QueuedJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job in the log. place: among all open jobs by arrival; place_in_owner: in its model's or sampler's own order. Both from 1.

    starts: how many gangs began it. bytes: of the payload as stored.
    """

    place: int
    place_in_owner: int
    future_id: FutureId
    op: str
    owner: str
    seq: int
    tenant: TenantId
    age_s: float
    tokens: int
    bytes: int
    starts: int
    is_running: bool


class HeldJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job that came before an earlier one of its lane. waits_for_seq: the first that is missing."""

    future_id: FutureId
    op: str
    owner: ModelId
    seq: int
    tenant: TenantId
    age_s: float
    tokens: int
    bytes: int
    waits_for_seq: int


class OwnerQueue(msgspec.Struct, frozen=True, kw_only=True):
    """What one model or sampler has open. state, next_seq and applied: of a model's record, lane 0; None for a sampler."""

    owner: str
    tenant: TenantId
    num_queued: int
    num_held: int
    num_running: int
    tokens: int
    bytes: int
    oldest_s: float
    state: str | None = None
    next_seq: int | None = None
    applied: int | None = None


class TenantQueue(msgspec.Struct, frozen=True, kw_only=True):
    """What counts against a tenant's budgets."""

    tenant: TenantId
    num_jobs: int
    bytes: int


class Gang(msgspec.Struct, frozen=True, kw_only=True):
    """Who works. epoch: of the newest gang. lease_left_s: 0 when nobody holds the lease, so that nothing is worked on."""

    epoch: int
    lease_owner: str
    lease_left_s: float
    base_model: str | None


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """The batch that the gang is at. batch None: only the started marks of its jobs are known, not the batch."""

    future_ids: list[FutureId]
    op: str | None = None
    batch: str | None = None
    for_s: float | None = None


class QueueLook(msgspec.Struct, frozen=True, kw_only=True):
    """One look. num_jobs and bytes are the server's own totals; jobs holds fewer of them when is_cut is true.

    job_ms: the smoothed time between two finished jobs, None before the first one.
    """

    engine: str
    at_ms: int
    gang: Gang
    running: Running | None
    num_jobs: int
    bytes: int
    job_ms: float | None
    last_batch: str | None
    last_done_s: float | None
    tenants: list[TenantQueue]
    owners: list[OwnerQueue]
    jobs: list[QueuedJob]
    held: list[HeldJob]
    is_cut: bool = False
