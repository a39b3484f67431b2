"""Training: forward_backward, forward and optim_step."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field

from gradstream.api.body import Body, documents, is_protobuf, offloaded, raw_body
from gradstream.api.encoding import Encoded, encoded_training
from gradstream.api.ordered import (
    LANED,
    Caller,
    OrderedBody,
    Place,
    Promise,
    caller_of,
    ordered_body,
    place_in_json,
    place_of,
    refusing,
    submit_at,
    submit_encoded,
    unreadable,
)
from gradstream.api.parts import Parts, parts_of
from gradstream.api.tinker import training_json, training_proto
from gradstream.api.tinker.answers import Answer
from gradstream.api.training_data import to_payload
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest, Unsupported, UserError
from gradstream.shared.hyperparameters import check_adam
from gradstream.shared.wire import AdamParams, OptimStep

router = APIRouter()
_PROTOBUF_BODY = "ForwardBackwardRequest of api/tinker/proto/wire.proto; Content-Encoding zstd is read too"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Read:
    """A request as it was read: its place, and its job or why it is refused there."""

    place: Place
    job: Encoded | UserError


@router.post("/forward_backward", openapi_extra=documents(protobuf=_PROTOBUF_BODY) | LANED)
async def forward_backward(request: Request) -> Answer:
    """Loss and gradients of some datums; only the loss with forward_only. Protobuf, or the JSON of older SDKs.

    The same (model_id, seq_id) with the same content is the same future, in whatever encoding it came.
    """
    parts, caller = parts_of(request), caller_of(request)
    if is_protobuf(request.scope):
        async with raw_body(request, parts, max_bytes=parts.config.max_body_bytes) as raw:
            return Answer(await _from_protobuf(parts, raw, caller=caller))
    async with raw_body(request, parts, max_bytes=parts.config.max_json_body_bytes) as raw:
        return Answer(await _from_json(parts, raw, caller=caller, backward=True))


@router.post("/forward", openapi_extra=LANED)
async def forward(request: Request) -> Answer:
    """Only the loss; JSON of older SDKs. Newer ones send forward_backward with forward_only."""
    parts, caller = parts_of(request), caller_of(request)
    async with raw_body(request, parts, max_bytes=parts.config.max_json_body_bytes) as raw:
        return Answer(await _from_json(parts, raw, caller=caller, backward=False))


async def _from_protobuf(parts: Parts, raw: bytes, *, caller: Caller) -> Promise:
    card, max_datums = await parts.catalog.card(), parts.config.max_datums
    # Into a thread and back once: each way takes as long as parsing a small body.
    read = await offloaded(lambda: _read(raw, card, caller=caller, max_datums=max_datums), size_bytes=len(raw))
    if isinstance(read.job, UserError):
        async with refusing(parts, read.place):
            raise read.job
    return await submit_encoded(parts, read.place, read.job)


def _read(raw: bytes, card: EngineCard, *, caller: Caller, max_datums: int) -> _Read:
    """Raises InvalidRequest or PayloadTooLarge where not even the place can be told."""
    try:
        parsed = training_proto.parse_request(raw, max_datums=max_datums)
    except UserError as error:
        raise unreadable(error) from error
    place = place_of(parsed.message.model_id, parsed.message.seq_id, caller=caller)
    try:
        return _Read(place=place, job=encoded_training(to_payload(training_proto.training_data(parsed), card)))
    except UserError as error:
        return _Read(place=place, job=error)


async def _from_json(parts: Parts, raw: bytes, *, caller: Caller, backward: bool) -> Promise:
    size_bytes = len(raw)
    readable = await offloaded(lambda: place_in_json(raw, caller=caller), size_bytes=size_bytes)
    async with refusing(parts, readable):
        if backward:
            both = await offloaded(lambda: training_json.parse_forward_backward(raw), size_bytes=size_bytes)
            content = both.forward_backward_input
            place = place_of(both.model_id, both.seq_id, caller=caller)
        else:
            only = await offloaded(lambda: training_json.parse_forward(raw), size_bytes=size_bytes)
            content = only.forward_input
            place = place_of(only.model_id, only.seq_id, caller=caller)
    async with refusing(parts, place):
        card, max_datums = await parts.catalog.card(), parts.config.max_datums
        job = await offloaded(
            lambda: encoded_training(
                to_payload(training_json.training_data(content, backward=backward, max_datums=max_datums), card)
            ),
            size_bytes=size_bytes,
        )
    return await submit_encoded(parts, place, job)


class AdamBody(Body):
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(ge=0)] = 1e-12
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, Field(ge=0)] = 0.0


class OtherOptimizerBody(Body):
    """Parameters of an optimizer other than AdamW; recognised to be refused by name."""

    model_config = ConfigDict(extra="allow")

    type: str


class OptimStepBody(OrderedBody):
    """adam_params is what SDKs send for AdamW; optimizer_params names another optimizer."""

    adam_params: AdamBody | None = None
    optimizer_params: OtherOptimizerBody | None = None
    type: Literal["optim_step"] = "optim_step"


@router.post("/optim_step", openapi_extra=documents(OptimStepBody) | LANED)
async def optim_step(request: Request) -> Answer:
    """Applies the accumulated gradient once. The same (model_id, seq_id) with the same parameters is the same future."""
    parts = parts_of(request)
    body, place = await ordered_body(request, OptimStepBody)
    async with refusing(parts, place):
        payload = OptimStep(adam=_adam(body))
    return Answer(await submit_at(parts, place, payload))


def _adam(body: OptimStepBody) -> AdamParams:
    if body.optimizer_params is not None:
        raise Unsupported(
            f"optimizer_params.type: {body.optimizer_params.type!r} is not offered here; send adam_params"
        )
    if body.adam_params is None:
        raise InvalidRequest("adam_params: missing; send at least {}")
    adam = AdamParams(**body.adam_params.model_dump())
    check_adam(adam)
    return adam
