"""retrieve_future: the long poll."""

from fastapi import APIRouter, Request, Response

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, offloaded, small_body
from gradstream.api.futures import Expired, Finished, Missing, Pending, QueueState, poll
from gradstream.api.names import shown
from gradstream.api.parts import Parts, parts_of
from gradstream.api.retrieving import json_answer, no_longer_kept, no_such_future, try_again
from gradstream.api.xorl.results import outcome_json
from gradstream.shared import codec, ids
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId, ModelId, TenantId, name_of
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.model_record import ModelState
from gradstream.shared.wire import Failed

router = APIRouter()
_RECOVERING = Pending(state=QueueState.PAUSED_CAPACITY, reason="the queue cannot be reached now; ask again")


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
        return no_such_future(body.request_id)
    future_id = FutureId(body.request_id)
    try:
        await parts.intake.note_polled(future_id, tenant=tenant)
        answer = await poll(parts, future_id, tenant=tenant)
    except Unavailable:
        # A 5xx would be repeated without a pause.
        return try_again(future_id, _RECOVERING)
    match answer:
        case Finished(outcome=outcome):
            return await _finished(parts, future_id, outcome)
        case Pending():
            return try_again(future_id, answer)
        case Missing():
            return no_such_future(body.request_id)
        case Expired():
            return await _expired(parts, future_id, tenant=tenant)


async def _expired(parts: Parts, future_id: FutureId, *, tenant: TenantId) -> Response:
    """410, but that a model was made or dropped is known from its record: those calls give their futures again at any time."""
    model = ModelId(ids.future_parts(future_id).owner)
    record = await parts.intake.record(RecordKind.MODEL, model) or {}
    state = record.get("state") if record.get("tenant") == tenant else None
    if state == ModelState.READY and future_id == ids.future_id(model, int(record.get("made_at", "0"))):
        return json_answer({"type": "create_model", "model_id": name_of(model)})
    if state == ModelState.UNLOADED and future_id == ids.future_id(model, int(record.get("ended_at", "-1"))):
        return json_answer({"type": "unload_model", "model_id": name_of(model)})
    return no_longer_kept(future_id)


async def _finished(parts: Parts, future_id: FutureId, stored: bytes) -> Response:
    outcome = codec.decode_outcome(stored)
    if isinstance(outcome, Failed):
        parts.intake.mark_delivered(future_id)
        return json_answer(_failure(outcome))
    content = await offloaded(lambda: outcome_json(outcome), size_bytes=len(stored))
    parts.intake.mark_delivered(future_id)
    return Response(content, media_type="application/json")


# The HTTP status that a failure would have, where clients look for it in the text.
_NAMED_STATUSES = {"checkpoint_exists": 409, "storage_limit": 507}


def _failure(outcome: Failed) -> dict[str, str]:
    status = _NAMED_STATUSES.get(outcome.code)
    message = shown(outcome.message)
    text = message if status is None else f"{status}: {message}"
    return {"error": text, "category": outcome.category, "code": outcome.code}
