"""Requests that have a place in a model's order: reading the place, refusing it, submitting there."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import msgspec
from fastapi import Request

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, parse_small, small_bytes
from gradstream.api.encoding import Encoded, encoded
from gradstream.api.headers import headers
from gradstream.api.parts import Parts, parts_of
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest, SequenceConflict, UnknownModel, UserError
from gradstream.shared.ids import MAX_LANE, UNLOAD_SEQ, FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import Submission
from gradstream.shared.wire import Payload

LANE_HEADER = "X-Gradstream-Lane"
_LANE_HEADER = LANE_HEADER.lower().encode()
_LANE = re.compile(r"[0-9]{1,3}")
# Any: an OpenAPI fragment is free-form JSON.
LANED: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": LANE_HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "integer", "minimum": 0, "maximum": MAX_LANE, "default": 0},
            "description": "The lane of the process that sends, when several train one model; seq_ids count within it.",
        }
    ]
}


class OrderedBody(Body):
    """A small body with a place in its model's order."""

    model_id: str
    seq_id: int | None = None


OrderedT = TypeVar("OrderedT", bound=OrderedBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who sends an ordered request: a tenant, and which of the processes that train the model together."""

    tenant: TenantId
    lane: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a request belongs. seq is the seq_id within its lane of the model's seqs."""

    model: ModelId
    seq: int
    tenant: TenantId

    @property
    def lane(self) -> int:
        return ids.lane_of(self.seq)

    @property
    def checkpoint(self) -> str:
        """The name of a checkpoint that is saved here without one."""
        lane, seq_id = divmod(self.seq, ids.LANE_SEQS)
        return f"lane{lane}-{seq_id:06d}" if lane else f"{seq_id:06d}"


class _PlaceFields(msgspec.Struct):
    """The two fields of a JSON body that say where it belongs; everything else is skipped."""

    model_id: str
    seq_id: int


_PLACE = msgspec.json.Decoder(_PlaceFields)


def caller_of(request: Request) -> Caller:
    """Who sends the request; raises InvalidRequest for a header that names no lane."""
    match headers(request.scope, _LANE_HEADER):
        case []:
            lane = 0
        case [text] if _LANE.fullmatch(text) and int(text) <= MAX_LANE:
            lane = int(text)
        case texts:
            shown = ", ".join(texts)[:80]
            raise InvalidRequest(f"{LANE_HEADER}: {shown!r} is not one number from 0 to {MAX_LANE}")
    return Caller(tenant=tenant_of(request), lane=lane)


def place_of(model_id: str, seq_id: int | None, *, caller: Caller) -> Place:
    """The place; raises InvalidRequest when the two do not name one."""
    if not ids.is_valid_id(model_id):
        raise InvalidRequest(f"model_id: {model_id[:80]!r} is not an id; use the one that create_model gave")
    if seq_id is None:
        raise InvalidRequest("seq_id: missing; number the requests of a model 1, 2, 3 and so on")
    if not 1 <= seq_id < UNLOAD_SEQ:
        raise InvalidRequest(f"seq_id: {seq_id} is not between 1 and {UNLOAD_SEQ - 1}; a model's first request has 1")
    return Place(model=ModelId(model_id), seq=ids.seq_in_lane(caller.lane, seq_id), tenant=caller.tenant)


def place_in_json(raw: bytes, *, caller: Caller) -> Place | None:
    """The place of a JSON body that is wrong elsewhere, or None when it cannot be read."""
    try:
        fields = _PLACE.decode(raw)
        return place_of(fields.model_id, fields.seq_id, caller=caller)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRequest):
        return None


@asynccontextmanager
async def refusing(parts: Parts, place: Place | None) -> AsyncIterator[None]:
    """A UserError inside counts the place's seq as used before it goes on, so that later requests do not wait for it.

    Without a place its message says that they do. Raises Unavailable instead when that cannot be told yet, because the server is
    recovering.
    """
    start_s = parts.clock.monotonic_s()
    try:
        yield
    except UserError as error:
        await parts.recovery.check(error, since_s=start_s)
        if place is not None:
            try:
                await parts.intake.refuse(model=place.model, seq=place.seq, tenant=place.tenant)
            except UnknownModel as unknown:
                await parts.recovery.check(unknown, since_s=start_s)
                # The request's own fault is the better answer, also for a model that does not exist.
            raise
        raise unreadable(error) from error


def unreadable(error: UserError) -> UserError:
    """The same error of a body whose place cannot be told, with what its client has to know."""
    hint = "Which request this is could not be read, so its seq_id is still to come: later ones wait for it"
    return type(error)(f"{error.message}. {hint}")


async def ordered_body(request: Request, model: type[OrderedT]) -> tuple[OrderedT, Place]:
    """A small ordered body and its place; raises InvalidRequest, and refuses the place when it can be read."""
    caller = caller_of(request)
    raw = await small_bytes(request)
    async with refusing(parts_of(request), place_in_json(raw, caller=caller)):
        body = parse_small(raw, model)
    return body, place_of(body.model_id, body.seq_id, caller=caller)


class Promise(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to an accepted request: poll request_id."""

    request_id: FutureId
    model_id: ModelId | None = None
    sample_sequence_ids: list[str] | None = None


async def submit_at(parts: Parts, place: Place, payload: Payload) -> Promise:
    """The promise of a job in its model's order. The same (model, seq, payload) again is the same promise."""
    return await submit_encoded(parts, place, encoded(payload))


async def submit_encoded(parts: Parts, place: Place, job: Encoded) -> Promise:
    """submit_at for a payload that is encoded already."""
    submission = Submission(
        owner=place.model,
        seq=place.seq,
        op=job.op,
        tenant=place.tenant,
        payload=job.payload,
        num_tokens=job.num_tokens,
        packed=job.packed,
        # It has a seq to be known by.
        call="",
    )
    try:
        receipt = await parts.admission.submit(submission)
    except SequenceConflict as error:
        raise SequenceConflict(f"{error.message}. {_lane_advice(place)}") from error
    return Promise(request_id=receipt.future_id, model_id=place.model)


def _lane_advice(place: Place) -> str:
    """What helps when the conflict comes from a second process that counts its own seq_ids."""
    return (
        f"If several processes train this model, each needs a lane of its own: this request's is {place.lane}, and the header "
        f"{LANE_HEADER} names another (1 to {MAX_LANE})"
    )
