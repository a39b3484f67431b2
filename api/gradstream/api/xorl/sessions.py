"""Sessions of xorl clients: a session is a model, named by its client, and lives for as long as it is used."""

import uuid
from typing import ClassVar

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api.auth import tenant_of
from gradstream.api.body import documents, small_body
from gradstream.api.names import target
from gradstream.api.parts import parts_of
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.creation import CreateBody, made
from gradstream.api.xorl.models import record_of, target_of
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()


class CreateSessionBody(CreateBody):
    """A model as create_model takes it; without model_id or session_id the server makes up a name."""

    IDLE: ClassVar[frozenset[str]] = frozenset({"type", "tags", "user_metadata", "sdk_version"})

    model_id: str = ""


class SessionMade(BaseModel):
    """warning_message: what the client should know."""

    type: str = "create_session"
    session_id: str
    info_message: str | None = None
    warning_message: str | None = None
    error_message: str | None = None


class HeartbeatBody(NamedBody):
    """The session, as session_id or model_id."""


class SessionAlive(BaseModel):
    type: str = "session_heartbeat"


@router.post("/api/v1/create_session", openapi_extra=documents(CreateSessionBody))
async def create_session(request: Request) -> SessionMade:
    """Registers a session, which is a model: it is being made when this call is answered, and jobs may be sent to it."""
    parts = parts_of(request)
    body = await small_body(request, CreateSessionBody)
    meant = target(body.model_id or f"session-{uuid.uuid4().hex[:12]}", tenant=tenant_of(request), field="session_id")
    await made(parts, meant, body)
    return SessionMade(session_id=meant.name)


@router.post("/api/v1/session_heartbeat", openapi_extra=documents(HeartbeatBody))
async def session_heartbeat(request: Request) -> SessionAlive:
    """A sign of life: the model is in use, although it gets no jobs."""
    parts = parts_of(request)
    meant = target_of(await small_body(request, HeartbeatBody), tenant=tenant_of(request))
    await record_of(parts, meant)
    now_ms = str(parts.clock.wall_ms())
    await parts.intake.change_record(RecordKind.MODEL, meant.model, {"seen_ms": now_ms})
    return SessionAlive()
