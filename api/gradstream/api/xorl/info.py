"""GET session_info: which models a tenant has, and which of them are in use."""

from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.parts import Parts, parts_of
from gradstream.api.query import MAX_PAGE
from gradstream.api.records import Record
from gradstream.shared.activity import last_active_ms
from gradstream.shared.ids import TenantId, name_of
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.model_record import BROKEN_STATES, Dialect, ModelState, dialect_of, is_over, num_open_jobs

router = APIRouter()


class SessionActivity(BaseModel):
    """last_active: seconds since the Unix epoch. open_jobs: accepted and not done."""

    state: str
    last_active: float
    idle_s: float
    open_jobs: int


class SessionInfo(BaseModel):
    """registered_models: those that take jobs, by name. active_sessions: those of them that have open jobs.

    The adapters of the last four fields are all in memory at once here, so none is the current one.
    """

    registered_models: list[str]
    active_sessions: list[str]
    session_activity: dict[str, SessionActivity]
    idle_timeout_seconds: float
    loaded_sampling_adapters: list[str]
    loaded_training_adapters: list[str]
    max_training_adapters: int
    current_training_adapter: str | None


@router.get("/api/v1/session_info")
async def session_info(request: Request) -> SessionInfo:
    """The caller's models that are in memory, each with when it was used last."""
    parts = parts_of(request)
    now_ms = parts.clock.wall_ms()
    activity = {name_of(model): _activity(record, now_ms) async for model, record in _loaded(parts, tenant_of(request))}
    is_lora = (await parts.catalog.card()).is_lora
    return SessionInfo(
        registered_models=list(activity),
        active_sessions=[name for name, found in activity.items() if found.open_jobs],
        session_activity=activity,
        idle_timeout_seconds=parts.config.idle_session_timeout_s,
        loaded_sampling_adapters=[],
        loaded_training_adapters=list(activity) if is_lora else [],
        max_training_adapters=parts.config.max_models_per_tenant if is_lora else 0,
        current_training_adapter=None,
    )


async def _loaded(parts: Parts, tenant: TenantId) -> AsyncIterator[tuple[str, Record]]:
    """The tenant's models of this dialect that take jobs, newest first."""
    offset = 0
    while True:
        page = await parts.intake.list_tenant(RecordKind.MODEL, tenant, offset=offset, limit=MAX_PAGE)
        for model, record in page.records.items():
            is_ours = dialect_of(record) is Dialect.XORL
            if is_ours and record.get("state") not in BROKEN_STATES and not is_over(record):
                yield model, record
        offset += MAX_PAGE
        if offset >= page.total:
            return


def _activity(record: Record, now_ms: int) -> SessionActivity:
    last_ms = last_active_ms(record)
    return SessionActivity(
        # Made again behind an unload that is not executed yet, or just was.
        state=ModelState.CREATING if record["state"] == ModelState.UNLOADED else record["state"],
        last_active=last_ms / 1000,
        idle_s=max(0, now_ms - last_ms) / 1000,
        open_jobs=num_open_jobs(record),
    )
