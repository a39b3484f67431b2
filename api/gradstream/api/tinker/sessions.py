"""Sessions: one client's connection, kept alive by heartbeats."""

import json
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.budgets import check_session_room
from gradstream.api.errors import http_error
from gradstream.api.parts import parts_of
from gradstream.api.records import own_record, text_metadata
from gradstream.api.retrieving import json_answer
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
_NEWS_AFTER_MS = 1000


class CreateSessionBody(Body):
    tags: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=64, default_factory=list)]
    # Any: free-form JSON, kept as text.
    user_metadata: dict[str, Any] | None = None
    sdk_version: Annotated[str, Field(max_length=64)] = ""
    project_id: Annotated[str, Field(max_length=256)] | None = None
    display_name: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["create_session"] = "create_session"


class SessionCreated(BaseModel):
    type: str = "create_session"
    session_id: str


class HeartbeatBody(Body):
    session_id: str
    type: Literal["session_heartbeat"] = "session_heartbeat"


class Heartbeat(BaseModel):
    type: str = "session_heartbeat"


class FinishReason(Body):
    type: Literal["success", "errored", "interrupted"]


class FinishBody(Body):
    reason: FinishReason
    detail: Annotated[str, Field(max_length=16_384)] | None = None
    type: Literal["client_finished"] | None = None


@router.post("/create_session", openapi_extra=documents(CreateSessionBody))
async def create_session(request: Request) -> SessionCreated:
    """A new session. Each call makes another one: the id is random."""
    parts = parts_of(request)
    body = await small_body(request, CreateSessionBody)
    metadata = text_metadata(body.user_metadata) or {}
    await check_session_room(parts, tenant=tenant_of(request))
    session_id = str(uuid.uuid4())
    now_ms = str(parts.clock.wall_ms())
    await parts.intake.put_record(
        RecordKind.SESSION,
        session_id,
        {
            "tenant": tenant_of(request),
            "created_ms": now_ms,
            "heartbeat_ms": now_ms,
            "sdk_version": body.sdk_version,
            "tags": json.dumps(body.tags),
            "user_metadata": json.dumps(metadata),
            "project_id": body.project_id or "",
            "display_name": body.display_name or "",
        },
    )
    return SessionCreated(session_id=session_id)


@router.post(
    "/session_heartbeat",
    response_model=Heartbeat,
    openapi_extra=documents(HeartbeatBody),
    responses={410: {"description": "the session was finished"}},
)
async def session_heartbeat(request: Request) -> Response:
    """Keeps the session alive; 410 tells the SDK to stop."""
    parts = parts_of(request)
    body = await small_body(request, HeartbeatBody)
    record = await own_record(parts, RecordKind.SESSION, body.session_id, tenant=tenant_of(request), field="session_id")
    if "finished_ms" in record:
        return http_error(410, code="session_finished", detail=f"session_id: session {body.session_id!r} was finished")
    if _is_news(record, now_ms=parts.clock.wall_ms()):
        await parts.intake.put_record(RecordKind.SESSION, body.session_id, {"heartbeat_ms": str(parts.clock.wall_ms())})
    return json_answer(Heartbeat().model_dump())


def _is_news(record: Mapping[str, str], *, now_ms: int) -> bool:
    """True unless the session's last heartbeat was just now: writing it down again would wait for the disk and tell nobody anything.

    The first heartbeat is always news: by it a session that is kept alive is told from one that never was.
    """
    heartbeat_ms = int(record.get("heartbeat_ms") or 0)
    return heartbeat_ms <= int(record.get("created_ms") or 0) or not 0 <= now_ms - heartbeat_ms < _NEWS_AFTER_MS


@router.post("/sessions/{session_id}/finish", status_code=204, openapi_extra=documents(FinishBody))
async def finish_session(session_id: str, request: Request) -> Response:
    """Marks the session finished. The first finish stands; later ones change nothing."""
    parts = parts_of(request)
    body = await small_body(request, FinishBody)
    record = await own_record(parts, RecordKind.SESSION, session_id, tenant=tenant_of(request), field="session_id")
    if "finished_ms" not in record:
        await parts.intake.put_record(
            RecordKind.SESSION,
            session_id,
            {
                "finished_ms": str(parts.clock.wall_ms()),
                "finish_reason": body.reason.type,
                "finish_detail": body.detail or "",
            },
        )
    return Response(status_code=204)
