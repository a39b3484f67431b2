"""Budgets, lifetimes and sizes of the job log."""

from dataclasses import dataclass

from gradstream.shared.config import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the queue may hold and for how long. Sizes are of payloads as stored (compressed)."""

    max_queued_jobs_per_model: int = 256
    max_queued_jobs_per_sampler: int = 4096
    max_queued_jobs_per_tenant: int = 20_000
    # A job this many seqs or more ahead of its model's next one is not held but sent back.
    hold_window: int = 1024
    hold_timeout_s: float = 120.0
    max_queued_bytes_per_tenant: int = 512 * 1024**2
    max_queued_bytes: int = 1024**3
    max_unread_bytes_per_tenant: int = 256 * 1024**2
    max_payload_bytes: int = 256 * 1024**2
    unread_ttl_s: int = 24 * 3600
    delivered_ttl_s: int = 600
    inline_bytes: int = 16 * 1024
    # A blob lives this long unless a submission accepts it.
    orphan_blob_ttl_s: int = 600
    # An executed job's blob stays this long for inspection.
    keep_blob_s: int = 3600
    keep_log_entries: int = 10_000
    keep_journal_entries: int = 100_000
    keep_notes: int = 10_000
    # The same request sent again within this time is the same job, where the server numbers a model's jobs.
    retry_window_s: int = 600
    # Digests of this many used seqs per model are kept, so that a late retry is recognised.
    keep_seqs: int = 4096
    lease_ttl_s: float = 15.0
    min_retry_after_s: float = 1.0
    max_retry_after_s: float = 30.0


def limits_of(settings: Settings) -> Limits:
    """The budgets and lifetimes that the settings ask for; the same in every process that opens the job log."""
    return Limits(
        max_queued_jobs_per_model=settings.max_queued_jobs_per_model,
        max_queued_jobs_per_sampler=settings.max_queued_jobs_per_sampler,
        max_queued_jobs_per_tenant=settings.max_queued_jobs_per_tenant,
        hold_timeout_s=settings.hold_timeout_s,
        max_queued_bytes_per_tenant=settings.max_queued_bytes_per_tenant,
        max_queued_bytes=settings.max_queued_bytes,
        max_unread_bytes_per_tenant=settings.max_unread_bytes_per_tenant,
        unread_ttl_s=settings.unread_result_ttl_s,
        delivered_ttl_s=settings.delivered_result_ttl_s,
        lease_ttl_s=settings.lease_ttl_s,
    )
