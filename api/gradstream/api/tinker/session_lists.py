"""Sessions after they were made: listing, looking at one, searching, projects, traces."""

from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.parts import Parts, parts_of
from gradstream.api.query import MAX_PAGE, Query, ScopedPageQuery, ScopeQuery, query, takes
from gradstream.api.records import Record, metadata_of, own_record, when
from gradstream.api.tinker.session_search import CursorBody, SearchBody, SessionSummary, matches, summary
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
# A session's models and samplers come in one answer; one that made more shows its newest.
_MAX_OF_SESSION = 10_000


class SessionIds(BaseModel):
    sessions: list[str]


class Session(BaseModel):
    training_run_ids: list[str]
    sampler_ids: list[str]
    user_metadata: dict[str, str] | None
    display_name: str | None


class SearchCursor(BaseModel):
    last_created_at: datetime
    last_session_id: str


class SearchResult(BaseModel):
    sessions: list[SessionSummary]
    next_cursor: SearchCursor | None


class ProjectBody(Body):
    project_id: Annotated[str, Field(min_length=1, max_length=256)]


class TraceExport(BaseModel):
    status: Literal["failed"] = "failed"
    error: str


@router.get("/sessions", openapi_extra=takes(ScopedPageQuery))
async def list_sessions(request: Request) -> SessionIds:
    """The ids of a page of the caller's sessions, newest first. A project_id keeps that project's sessions, of this page."""
    asked = query(request, ScopedPageQuery)
    page = await parts_of(request).intake.list_tenant(
        RecordKind.SESSION, tenant_of(request), offset=asked.offset, limit=asked.page
    )
    names = [
        name
        for name, record in page.records.items()
        if asked.project_id is None or record.get("project_id") == asked.project_id
    ]
    return SessionIds(sessions=names)


@router.post("/sessions/search", openapi_extra=documents(SearchBody))
async def search_sessions(request: Request) -> SearchResult:
    """The caller's sessions that match, newest first, one page of them."""
    parts = parts_of(request)
    asked = await small_body(request, SearchBody)
    found: list[tuple[str, Record]] = []
    async for session_id, record in _sessions(parts, tenant=tenant_of(request)):
        if _is_behind(session_id, record, asked.cursor) and matches(session_id, record, asked):
            found.append((session_id, record))
            if len(found) > asked.limit:
                break
    shown = found[: asked.limit]
    counts = [await _num_checkpoints(parts, session_id) for session_id, _ in shown]
    last = shown[-1] if len(found) > asked.limit else None
    return SearchResult(
        sessions=[summary(name, record, num_checkpoints=n) for (name, record), n in zip(shown, counts, strict=True)],
        next_cursor=None
        if last is None
        else SearchCursor(last_created_at=when(last[1]["created_ms"]), last_session_id=last[0]),
    )


@router.get("/sessions/{session_id}", openapi_extra=takes(ScopeQuery))
async def get_session(session_id: str, request: Request) -> Session:
    """A session with its training runs and samplers, newest first."""
    parts = parts_of(request)
    query(request, ScopeQuery)
    record = await _own(parts, session_id, tenant=tenant_of(request))
    runs = await parts.intake.list_children(RecordKind.MODEL, session_id, offset=0, limit=_MAX_OF_SESSION)
    samplers = await parts.intake.list_children(RecordKind.SAMPLER, session_id, offset=0, limit=_MAX_OF_SESSION)
    return Session(
        training_run_ids=list(runs.records),
        sampler_ids=list(samplers.records),
        user_metadata=metadata_of(record),
        display_name=record.get("display_name") or None,
    )


@router.put("/sessions/{session_id}/project", status_code=204, openapi_extra=documents(ProjectBody))
async def set_project(session_id: str, request: Request) -> Response:
    """Puts the session under a project, which is only a name here: it groups sessions in lists and searches."""
    parts = parts_of(request)
    body = await small_body(request, ProjectBody)
    await _own(parts, session_id, tenant=tenant_of(request))
    if not await parts.intake.change_record(RecordKind.SESSION, session_id, {"project_id": body.project_id}):
        raise UnknownModel(f"session_id: there is no session {session_id!r}")
    return Response(status_code=204)


@router.get("/sessions/{session_id}/trace_export", openapi_extra=takes(Query))
async def export_trace(session_id: str, request: Request) -> TraceExport:
    """Always failed: this server records no timelines of sessions."""
    query(request, Query)
    await _own(parts_of(request), session_id, tenant=tenant_of(request))
    return TraceExport(
        error="this server does not record session traces; its log and /metrics tell what ran and for how long"
    )


async def _own(parts: Parts, session_id: str, *, tenant: TenantId) -> Record:
    return await own_record(parts, RecordKind.SESSION, session_id, tenant=tenant, field="session_id")


async def _sessions(parts: Parts, *, tenant: TenantId) -> AsyncIterator[tuple[str, Record]]:
    """All of a tenant's sessions, newest first. One made meanwhile pushes the others back, so one may be read twice."""
    offset = 0
    seen: set[str] = set()
    while True:
        page = await parts.intake.list_tenant(RecordKind.SESSION, tenant, offset=offset, limit=MAX_PAGE)
        for session_id, record in page.records.items():
            if session_id not in seen:
                seen.add(session_id)
                yield session_id, record
        offset += MAX_PAGE
        if offset >= page.total:
            return


def _is_behind(session_id: str, record: Record, cursor: CursorBody | None) -> bool:
    """True when the session comes after the cursor in the order of the list: time, then id, both falling."""
    if cursor is None:
        return True
    return (when(record["created_ms"]), session_id) < (cursor.last_created_at, cursor.last_session_id)


async def _num_checkpoints(parts: Parts, session_id: str) -> int:
    runs = await parts.intake.list_children(RecordKind.MODEL, session_id, offset=0, limit=_MAX_OF_SESSION)
    return sum(await parts.intake.num_children(RecordKind.CHECKPOINT, list(runs.records)))
