"""Requests that have a place in a model's order: reading the place, refusing it, submitting there."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from fastapi import Request

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, parse_small, small_bytes
from gradstream.api.parts import Parts, parts_of
from gradstream.shared import codec, ids
from gradstream.shared.errors import InvalidRequest, UnknownModel, UserError
from gradstream.shared.ids import UNLOAD_SEQ, FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import Submission
from gradstream.shared.wire import Payload


class OrderedBody(Body):
    """A small body with a place in its model's order."""

    model_id: str
    seq_id: int | None = None


OrderedT = TypeVar("OrderedT", bound=OrderedBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a request belongs."""

    model: ModelId
    seq: int
    tenant: TenantId


class _PlaceFields(msgspec.Struct):
    """The two fields of a JSON body that say where it belongs; everything else is skipped."""

    model_id: str
    seq_id: int


_PLACE = msgspec.json.Decoder(_PlaceFields)


def place_of(model_id: str, seq_id: int | None, *, tenant: TenantId) -> Place:
    """The place; raises InvalidRequest when the two do not name one."""
    if not ids.is_valid_id(model_id):
        raise InvalidRequest(f"model_id: {model_id[:80]!r} is not an id; use the one that create_model gave")
    if seq_id is None:
        raise InvalidRequest("seq_id: missing; number the requests of a model 1, 2, 3 and so on")
    if not 1 <= seq_id < UNLOAD_SEQ:
        raise InvalidRequest(f"seq_id: {seq_id} is not between 1 and {UNLOAD_SEQ - 1}; a model's first request has 1")
    return Place(model=ModelId(model_id), seq=seq_id, tenant=tenant)


def place_in_json(raw: bytes, *, tenant: TenantId) -> Place | None:
    """The place of a JSON body that is wrong elsewhere, or None when it cannot be read."""
    try:
        fields = _PLACE.decode(raw)
        return place_of(fields.model_id, fields.seq_id, tenant=tenant)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, InvalidRequest):
        return None


@asynccontextmanager
async def refusing(parts: Parts, place: Place | None) -> AsyncIterator[None]:
    """A UserError inside counts the place's seq as used before it goes on, so that later requests do not wait for it."""
    try:
        yield
    except UserError:
        if place is not None:
            # The request's own fault is the better answer, also for a model that does not exist.
            with suppress(UnknownModel):
                await parts.intake.refuse(model=place.model, seq=place.seq, tenant=place.tenant)
        raise


async def ordered_body(request: Request, model: type[OrderedT]) -> tuple[OrderedT, Place]:
    """A small ordered body and its place; raises InvalidRequest, and refuses the place when it can be read."""
    tenant = tenant_of(request)
    raw = await small_bytes(request)
    async with refusing(parts_of(request), place_in_json(raw, tenant=tenant)):
        body = parse_small(raw, model)
    return body, place_of(body.model_id, body.seq_id, tenant=tenant)


class Promise(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer to an accepted request: poll request_id."""

    request_id: FutureId
    model_id: ModelId | None = None
    sample_sequence_ids: list[str] | None = None


async def submit_at(parts: Parts, place: Place, payload: Payload) -> Promise:
    """The promise of a job in its model's order. The same (model, seq, payload) again is the same promise."""
    return await submit_encoded(parts, place, op=codec.op_of(payload), payload=codec.encode(payload), num_tokens=0)


async def submit_encoded(parts: Parts, place: Place, *, op: str, payload: bytes, num_tokens: int) -> Promise:
    """submit_at for a payload that is encoded already."""
    receipt = await parts.admission.submit(
        Submission(
            owner=place.model,
            seq=place.seq,
            op=op,
            tenant=place.tenant,
            payload=payload,
            num_tokens=num_tokens,
        )
    )
    return Promise(request_id=receipt.future_id, model_id=place.model)
