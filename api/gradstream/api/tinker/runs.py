"""Training runs: the models of a tenant, those that were unloaded included."""

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.dialect import is_name
from gradstream.api.names import target
from gradstream.api.parts import parts_of
from gradstream.api.query import ScopedPageQuery, ScopeQuery, query, takes
from gradstream.api.records import own_record
from gradstream.api.tinker.views import Cursor, TrainingRun, run_view
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()


class TrainingRuns(BaseModel):
    training_runs: list[TrainingRun]
    cursor: Cursor


@router.get("/training_runs", openapi_extra=takes(ScopedPageQuery))
async def list_training_runs(request: Request) -> TrainingRuns:
    """A page of the caller's runs, newest first. A project_id keeps the runs of that project's sessions, of this page."""
    parts, tenant = parts_of(request), tenant_of(request)
    asked = query(request, ScopedPageQuery)
    page = await parts.intake.list_tenant(RecordKind.MODEL, tenant, offset=asked.offset, limit=asked.page)
    runs = []
    for run, record in page.records.items():
        if asked.project_id is not None:
            session = await parts.intake.record(RecordKind.SESSION, record.get("session", "")) or {}
            if session.get("project_id") != asked.project_id:
                continue
        runs.append(await run_view(parts, run, record, tenant=tenant))
    return TrainingRuns(
        training_runs=runs, cursor=Cursor(offset=asked.offset, limit=asked.page, total_count=page.total)
    )


@router.get("/training_runs/{run_id}", openapi_extra=takes(ScopeQuery))
async def get_training_run(run_id: str, request: Request) -> TrainingRun:
    """One run; 404 for an unknown one."""
    parts, tenant = parts_of(request), tenant_of(request)
    query(request, ScopeQuery)
    # Runs of models that their clients named are listed under these names.
    run = target(run_id, tenant=tenant).model if is_name(run_id) else run_id
    record = await own_record(parts, RecordKind.MODEL, run, tenant=tenant, field="training_run_id")
    return await run_view(parts, run, record, tenant=tenant)
