"""retrieve_future: the long poll."""

from contextlib import suppress
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.background import BackgroundTask

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, offloaded, small_body
from gradstream.api.errors import http_error, response_of
from gradstream.api.futures import Expired, Finished, Missing, Pending, QueueState, poll
from gradstream.api.names import name_of, shown
from gradstream.api.parts import Parts, parts_of
from gradstream.api.xorl.results import outcome_json
from gradstream.shared import codec, ids
from gradstream.shared.errors import Unavailable, UnknownModel
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import Failed

router = APIRouter()
_RECOVERING = "the queue cannot be reached now; ask again"


class RetrieveBody(Body):
    """type, model and allow_metadata_only mean nothing here."""

    request_id: str
    type: str | None = None
    model: str | None = None
    allow_metadata_only: bool = False


@router.post("/api/v1/retrieve_future", openapi_extra=documents(RetrieveBody))
async def retrieve_future(request: Request) -> Response:
    """The result; `{error, category}` when the job failed; try_again when it is not done after ~25 s. Always 200 for a job there is.

    404: there is no such future. 410: its result is no longer kept.
    """
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, RetrieveBody)
    if not ids.is_valid_future_id(body.request_id):
        return _missing(body)
    future_id = FutureId(body.request_id)
    try:
        await parts.intake.note_polled(future_id, tenant=tenant)
        answer = await poll(parts, future_id, tenant=tenant)
    except Unavailable:
        # A 5xx would be repeated without a pause.
        return _try_again(future_id, QueueState.PAUSED_CAPACITY, _RECOVERING)
    match answer:
        case Finished(outcome=outcome):
            return await _finished(parts, future_id, outcome)
        case Pending(state=state, reason=reason):
            return _try_again(future_id, state, reason)
        case Missing():
            return _missing(body)
        case Expired():
            return await _expired(parts, future_id, tenant=tenant)


def _try_again(future_id: FutureId, state: QueueState, reason: str | None) -> Response:
    return _json({"type": "try_again", "request_id": future_id, "queue_state": state, "queue_state_reason": reason})


def _missing(body: RetrieveBody) -> Response:
    return response_of(UnknownModel(f"request_id: there is no future {body.request_id[:80]!r}"))


async def _expired(parts: Parts, future_id: FutureId, *, tenant: TenantId) -> Response:
    """410, but that a model was made or dropped is known from its record: those calls give their futures again at any time."""
    model, _, seq = future_id.rpartition(":")
    record = await parts.intake.record(RecordKind.MODEL, model) or {}
    state = record.get("state") if record.get("tenant") == tenant else None
    if state == "ready" and record.get("made_at", "0") == seq:
        return _json({"type": "create_model", "model_id": name_of(model)})
    if state == "unloaded" and record.get("ended_at") == seq:
        return _json({"type": "unload_model", "model_id": name_of(model)})
    return http_error(410, code="expired", detail=f"request_id: the result of {future_id!r} is no longer kept")


async def _finished(parts: Parts, future_id: FutureId, stored: bytes) -> Response:
    outcome = codec.decode_outcome(stored)
    delivered = BackgroundTask(_note_delivery, parts, future_id)
    if isinstance(outcome, Failed):
        return _json(_failure(outcome), background=delivered)
    content = await offloaded(lambda: outcome_json(outcome), size_bytes=len(stored))
    return Response(content, media_type="application/json", background=delivered)


# The HTTP status that a failure would have, where clients look for it in the text.
_NAMED_STATUSES = {"checkpoint_exists": 409, "storage_limit": 507}


def _failure(outcome: Failed) -> dict[str, str]:
    status = _NAMED_STATUSES.get(outcome.code)
    message = shown(outcome.message)
    text = message if status is None else f"{status}: {message}"
    return {"error": text, "category": outcome.category, "code": outcome.code}


async def _note_delivery(parts: Parts, future_id: FutureId) -> None:
    """After the answer was sent: with the queue away the result only lives longer."""
    with suppress(Unavailable):
        await parts.intake.mark_delivered(future_id)


# Any: small free-form JSON answers.
def _json(content: dict[str, Any], *, background: BackgroundTask | None = None) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json", background=background)
