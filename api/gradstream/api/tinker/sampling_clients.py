"""One client of a sampler among several: its number, the stream of its finished samples, and samples it gave up."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, offloaded, parse_small, raw_body, small_body
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import own_record
from gradstream.shared import ids
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import FutureId, SamplerId
from gradstream.shared.joblog.port import Completion, Completions, RecordKind

router = APIRouter()
_MAX_BODY_BYTES = 8 * 1024 * 1024
_MAX_CURSOR = 2**63 - 1


class TargetBody(Body):
    """cloned_sampler_id: the block of 10^9 seq_ids that the client numbers its samples from."""

    type: Literal["sampling_session"] = "sampling_session"
    sampling_session_id: str
    cloned_sampler_id: Annotated[int, Field(ge=0, le=2**34)] = 0


class RetrieveFuturesBody(Body):
    """prev_cursor: the last answer's cursor. timeout: seconds; null means as long as the server likes, 0 answers at once."""

    target: TargetBody
    prev_cursor: Annotated[int, Field(ge=0, le=_MAX_CURSOR)] = 0
    timeout: Annotated[float, Field(ge=0, le=3600)] | None = None
    retrieved_request_ids: Annotated[list[str], Field(max_length=20_000, default_factory=list)]


class RetrievedFutures(BaseModel):
    # Any: one of the SDK's two completion objects.
    completions: list[dict[str, Any]]
    cursor: int


class CancelBody(Body):
    request_id: str


class JoinBody(Body):
    sampling_session_id: str
    type: Literal["join_sampling_session"] = "join_sampling_session"


class Joined(BaseModel):
    type: str = "join_sampling_session"
    client_counter: int


@router.post("/retrieve_futures", openapi_extra=documents(RetrieveFuturesBody))
async def retrieve_futures(request: Request) -> RetrievedFutures:
    """The client's samples that ended since prev_cursor, as soon as there is one or the poll's time is over.

    prev_cursor itself says that everything up to it was seen. Results of retrieved_request_ids need not be kept for long.
    """
    parts = parts_of(request)
    async with raw_body(request, parts, max_bytes=_MAX_BODY_BYTES) as raw:
        body = await offloaded(lambda: parse_small(raw, RetrieveFuturesBody), size_bytes=len(raw))
    target = body.target
    await own_record(
        parts, RecordKind.SAMPLER, target.sampling_session_id, tenant=tenant_of(request), field="sampling_session_id"
    )
    sampler = SamplerId(target.sampling_session_id)
    _acknowledge(parts, sampler, body.retrieved_request_ids)
    found = await _completions(parts, sampler, body)
    return RetrievedFutures(completions=[_view(item) for item in found.items], cursor=found.cursor)


async def _completions(parts: Parts, sampler: SamplerId, body: RetrieveFuturesBody) -> Completions:
    longest_s = parts.config.poll_hold_s
    timeout_s = longest_s if body.timeout is None else min(body.timeout, longest_s)
    waiting = parts.intake.completions(
        sampler, body.target.cloned_sampler_id, after=body.prev_cursor, timeout_s=timeout_s
    )
    with parts.metrics.polls_parked.track_inprogress():
        found = await parts.parked.wait(waiting)
    return found or Completions(items=(), cursor=body.prev_cursor)


def _acknowledge(parts: Parts, sampler: SamplerId, request_ids: list[str]) -> None:
    """Shorten the life of results that the client has; ids of anything but this sampler's samples are skipped."""
    for name in request_ids:
        if name.startswith(f"{sampler}:") and ids.is_valid_future_id(name):
            parts.intake.mark_delivered(FutureId(name))


def _view(item: Completion) -> dict[str, Any]:
    if item.is_failed:
        return {"state": "failed", "request_id": item.future_id}
    # The result's protobuf differs from the stored outcome by little more than field names.
    return {
        "state": "finished",
        "request_id": item.future_id,
        "response_payload_uncompressed_size": item.num_bytes,
    }


@router.post("/cancel_future", status_code=204, openapi_extra=documents(CancelBody))
async def cancel_future(request: Request) -> Response:
    """Drops a sample that has not started. Always 204: what has started, is done or is unknown stays as it is."""
    parts = parts_of(request)
    body = await small_body(request, CancelBody)
    if ids.is_valid_future_id(body.request_id):
        await parts.intake.cancel(FutureId(body.request_id), tenant=tenant_of(request))
    return Response(status_code=204)


@router.post("/join_sampling_session", openapi_extra=documents(JoinBody))
async def join_sampling_session(request: Request) -> Joined:
    """A number that no other client of this sampler has, from 1 on."""
    parts = parts_of(request)
    body = await small_body(request, JoinBody)
    await own_record(
        parts, RecordKind.SAMPLER, body.sampling_session_id, tenant=tenant_of(request), field="sampling_session_id"
    )
    counter = await parts.intake.count_up(RecordKind.SAMPLER, body.sampling_session_id, "clients")
    if not counter:
        raise UnknownModel(f"sampling_session_id: there is no sampler {body.sampling_session_id!r}")
    return Joined(client_counter=counter)
