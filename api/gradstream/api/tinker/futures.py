"""retrieve_future: the long poll."""

from typing import Literal

from fastapi import APIRouter, Request, Response

from gradstream.api.auth import tenant_of
from gradstream.api.body import PROTOBUF, Body, documents, offloaded, small_body
from gradstream.api.errors import response_of
from gradstream.api.futures import Expired, Finished, Missing, Pending, poll
from gradstream.api.headers import header
from gradstream.api.parts import Parts, parts_of
from gradstream.api.retrieving import json_answer, no_longer_kept, no_such_future, try_again
from gradstream.api.tinker.results import Rendered, render
from gradstream.shared import codec, ids
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Failed

router = APIRouter()


class RetrieveFutureBody(Body):
    """allow_metadata_only: a large result may be announced with its size before it is sent."""

    request_id: str
    allow_metadata_only: bool = False
    type: Literal["retrieve_future"] | None = None


@router.post("/retrieve_future", openapi_extra=documents(RetrieveFutureBody))
async def retrieve_future(request: Request) -> Response:
    """The typed result, `{error, category}` when the job failed, or 408 try_again when it is not done after ~25 s.

    404: there is no such future. 410: its result is no longer kept. 429: the queue cannot be reached now; the SDK backs off on 429,
    while it repeats a 5xx without a pause.
    """
    parts = parts_of(request)
    body = await small_body(request, RetrieveFutureBody)
    if not ids.is_valid_future_id(body.request_id):
        return no_such_future(body.request_id)
    future_id = FutureId(body.request_id)
    try:
        answer = await poll(parts, future_id, tenant=tenant_of(request))
    except Unavailable as error:
        return response_of(error, status=429)
    match answer:
        case Finished(outcome=outcome):
            return await _finished(parts, request, body, outcome)
        case Pending():
            return try_again(future_id, answer, status=408)
        case Missing():
            return no_such_future(body.request_id)
        case Expired():
            return no_longer_kept(future_id)


async def _finished(parts: Parts, request: Request, body: RetrieveFutureBody, stored: bytes) -> Response:
    future_id = FutureId(body.request_id)
    outcome = codec.decode_outcome(stored)
    if isinstance(outcome, Failed):
        parts.intake.mark_delivered(future_id)
        return json_answer({"error": outcome.message, "category": outcome.category, "code": outcome.code})
    accepts_protobuf = PROTOBUF in (header(request.scope, b"accept") or "")
    rendered: Rendered = await offloaded(
        lambda: render(outcome, accepts_protobuf=accepts_protobuf), size_bytes=len(stored)
    )
    if body.allow_metadata_only and len(rendered.content) > parts.config.inline_result_bytes:
        return json_answer(
            {
                "status": "complete_metadata",
                "request_id": future_id,
                "response_payload_size": len(rendered.content),
            }
        )
    parts.intake.mark_delivered(future_id)
    return Response(rendered.content, media_type=rendered.media_type)
