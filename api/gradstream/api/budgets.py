"""What a tenant may have lying around: records, stored checkpoints and exports. Queued jobs are the job log's to count, models the worker's."""

from dataclasses import dataclass

from gradstream.api.ordered import Place
from gradstream.api.parts import Parts
from gradstream.shared import ids
from gradstream.shared.errors import BudgetExceeded
from gradstream.shared.ids import ModelId, SamplerId, TenantId
from gradstream.shared.joblog.port import Intake, RecordKind

_PAGE = 1000
# Each may be as large as the base model, and they are made one after the other.
MAX_EXPORTS = 32


async def check_sampler_room(parts: Parts, sampler: SamplerId, *, tenant: TenantId, place: Place | None = None) -> None:
    """Raise BudgetExceeded when the tenant may not make this sampler; one that exists passes, and so does a retry of place's job.

    Requests that come at the same moment may each pass, so the number can end a few above the limit.
    """
    limit = parts.config.max_samplers_per_tenant
    page = await parts.intake.list_tenant(RecordKind.SAMPLER, tenant, offset=0, limit=1)
    if page.total < limit or await parts.intake.record(RecordKind.SAMPLER, sampler) is not None:
        return
    if place is None or not await _is_accepted(parts, place):
        raise BudgetExceeded(
            f"this tenant has {page.total} samplers and may have {limit}; those of a session go when it is finished"
        )


async def check_session_room(parts: Parts, *, tenant: TenantId) -> None:
    """Raise BudgetExceeded when the tenant has as many sessions on record as it may have."""
    limit = parts.config.max_sessions_per_tenant
    page = await parts.intake.list_tenant(RecordKind.SESSION, tenant, offset=0, limit=1)
    if page.total >= limit:
        raise BudgetExceeded(
            f"this tenant has {page.total} sessions on record and may have {limit}; ended ones are forgotten after two weeks"
        )


async def check_model_room(parts: Parts, model: ModelId, *, tenant: TenantId) -> None:
    """Raise BudgetExceeded when the tenant has as many models on record as it may have; one that exists passes."""
    limit = parts.config.max_model_records_per_tenant
    page = await parts.intake.list_tenant(RecordKind.MODEL, tenant, offset=0, limit=1)
    if page.total < limit or await parts.intake.record(RecordKind.MODEL, model) is not None:
        return
    raise BudgetExceeded(
        f"this tenant has {page.total} models on record and may have {limit}; those that are unloaded, failed or lost are "
        "forgotten after two weeks, unless a checkpoint of theirs is kept"
    )


async def check_storage_room(parts: Parts, place: Place) -> None:
    """Raise BudgetExceeded when the tenant's checkpoints fill what it may store, unless place's job is a retry.

    The save that crosses the line still passes.
    """
    refusal = await _storage_refusal(parts, place.tenant)
    if refusal is not None and not await _is_accepted(parts, place):
        raise refusal


async def check_storage_left(parts: Parts, *, tenant: TenantId) -> None:
    """Raise BudgetExceeded when the tenant's checkpoints fill what it may store. The save that crosses the line still passes."""
    refusal = await _storage_refusal(parts, tenant)
    if refusal is not None:
        raise refusal


async def _storage_refusal(parts: Parts, tenant: TenantId) -> BudgetExceeded | None:
    limit = parts.config.max_stored_bytes_per_tenant
    if limit is None:
        return None
    used = await stored(parts.intake, tenant)
    if used.size_bytes < limit:
        return None
    return BudgetExceeded(
        f"the {used.num_checkpoints} checkpoints of this tenant take {used.size_bytes} bytes and may take {limit}; "
        "delete some, or give them a time to live"
    )


async def check_export_room(parts: Parts, *, tenant: TenantId) -> None:
    """Raise BudgetExceeded when the tenant has as many exports as it may have, or fills what it may store."""
    page = await parts.intake.list_tenant(RecordKind.EXPORT, tenant, offset=0, limit=MAX_EXPORTS)
    if page.total >= MAX_EXPORTS:
        raise BudgetExceeded(
            f"this tenant has {page.total} exports and may have {MAX_EXPORTS}; delete some, or wait until they expire"
        )
    limit = parts.config.max_stored_bytes_per_tenant
    if limit is None:
        return
    exported = sum(int(record.get("size_bytes") or 0) for record in page.records.values())
    used = exported + (await stored(parts.intake, tenant)).size_bytes
    if used >= limit:
        raise BudgetExceeded(
            f"the checkpoints and exports of this tenant take {used} bytes and may take {limit}; delete some"
        )


async def _is_accepted(parts: Parts, place: Place) -> bool:
    """True for a request whose job was accepted before."""
    return await parts.intake.future(ids.future_id(place.model, place.seq)) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """What a tenant's checkpoints come to."""

    num_checkpoints: int
    size_bytes: int


async def stored(intake: Intake, tenant: TenantId) -> Stored:
    """The checkpoints of a tenant, counted from their records."""
    num_checkpoints = size_bytes = offset = 0
    while True:
        page = await intake.list_tenant(RecordKind.CHECKPOINT, tenant, offset=offset, limit=_PAGE)
        num_checkpoints += len(page.records)
        size_bytes += sum(int(record.get("size_bytes") or 0) for record in page.records.values())
        offset += _PAGE
        if offset >= page.total:
            return Stored(num_checkpoints=num_checkpoints, size_bytes=size_bytes)
