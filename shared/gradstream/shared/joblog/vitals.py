"""Signs of life of an engine, as its queue shows them: one look, for health checks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """The batch that the gang began last and has not ended. op: of its jobs. for_s: since when."""

    op: str
    num_jobs: int
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """epoch: of the gang that holds the lease, None when none does. heartbeat_age_s: since it renewed the lease last.

    num_jobs and num_bytes: accepted and without an outcome, held ones included. num_accepted: jobs ever accepted. tenant_jobs: those of
    num_jobs that belong to the tenant that was asked for.
    """

    epoch: int | None
    heartbeat_age_s: float | None
    running: Running | None
    num_jobs: int
    num_bytes: int
    num_accepted: int
    tenant_jobs: int
