"""sessions/search: what is asked, whether a session matches, and how it is shown."""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, Field

from gradstream.api.body import Body
from gradstream.api.records import Record, metadata_of, when

Text = Annotated[str, Field(max_length=256)]


class OwnerBody(Body):
    """own and accessible mean the same here: a tenant's access ends at what it owns. user names owners."""

    type: Literal["own", "accessible", "user"] = "own"
    owner_urns: Annotated[list[Text], Field(min_length=1, max_length=10)] | None = None


class StatusBody(Body):
    """reasons belongs to client_finished."""

    type: Literal["active", "cancelled", "failed", "client_finished"]
    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Field(min_length=1)] | None = None


class CursorBody(Body):
    """Where the page before ended."""

    # Text in JSON, so read leniently.
    last_created_at: Annotated[AwareDatetime, Field(strict=False)]
    last_session_id: Text


class SearchBody(Body):
    """A session matches by session_id or by display_name, when either is given, and by everything else."""

    session_id: Text | None = None
    project_ids: Annotated[list[Text], Field(max_length=100)] | None = None
    user_metadata: Annotated[
        dict[Text, Annotated[str, Field(max_length=4096)]], Field(max_length=64, default_factory=dict)
    ]
    display_name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    owner: OwnerBody = OwnerBody()
    statuses: Annotated[list[StatusBody], Field(min_length=1, max_length=16)] | None = None
    limit: Annotated[int, Field(ge=1, le=200)] = 50
    cursor: CursorBody | None = None


class SessionSummary(BaseModel):
    session_id: str
    created_at: datetime
    owner: str
    project_id: str
    # Any: one of the SDK's status objects.
    status: dict[str, Any] | None
    checkpoints_count: int
    display_name: str | None
    user_metadata: dict[str, str] | None


def matches(session_id: str, record: Record, asked: SearchBody) -> bool:
    """True when the session is one of those asked for; the cursor is not looked at."""
    if asked.owner.type == "user" and record["tenant"] not in (asked.owner.owner_urns or ()):
        return False
    if asked.project_ids is not None and record.get("project_id", "") not in asked.project_ids:
        return False
    found = metadata_of(record) or {}
    if any(found.get(name) != value for name, value in asked.user_metadata.items()):
        return False
    status = status_of(record)
    if asked.statuses is not None and not any(_is(status, wanted) for wanted in asked.statuses):
        return False
    return _is_named(session_id, record, asked)


def _is_named(session_id: str, record: Record, asked: SearchBody) -> bool:
    if asked.session_id is None and asked.display_name is None:
        return True
    if asked.session_id == session_id:
        return True
    words = (asked.display_name or "").lower().split()
    name = record.get("display_name", "").lower()
    return bool(words) and all(word in name for word in words)


# Any: one of the SDK's status objects.
def _is(status: Mapping[str, Any], wanted: StatusBody) -> bool:
    if status["type"] != wanted.type:
        return False
    return wanted.reasons is None or status.get("reason", {}).get("type") in wanted.reasons


def status_of(record: Record) -> dict[str, Any]:
    """active, or client_finished with the client's reason. A session that only stopped its heartbeats was interrupted."""
    if "finished_ms" in record:
        detail = record.get("finish_detail") or None
        return {"type": "client_finished", "reason": {"type": record["finish_reason"]}, "detail": detail}
    if int(record.get("swept_ms", "-1")) > int(record.get("heartbeat_ms", "0")):
        return {"type": "client_finished", "reason": {"type": "interrupted"}, "detail": "the heartbeats ended"}
    return {"type": "active"}


def summary(session_id: str, record: Record, *, num_checkpoints: int) -> SessionSummary:
    """The session as a search result."""
    return SessionSummary(
        session_id=session_id,
        created_at=when(record["created_ms"]),
        owner=record["tenant"],
        project_id=record.get("project_id", ""),
        status=status_of(record),
        checkpoints_count=num_checkpoints,
        display_name=record.get("display_name") or None,
        user_metadata=metadata_of(record),
    )
