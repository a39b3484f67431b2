"""Training: forward_backward, forward and optim_step."""

from typing import Annotated

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, offloaded, raw_body, small_body, typed
from gradstream.api.encoding import Encoded, encoded_training
from gradstream.api.names import Target, target
from gradstream.api.parts import Parts, parts_of
from gradstream.api.training_data import to_payload
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.data import ForwardInput, training_data
from gradstream.api.xorl.models import target_of
from gradstream.api.xorl.specs import StepDefaults
from gradstream.api.xorl.submitting import digest_of, promised, submit
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.hyperparameters import check_adam
from gradstream.shared.ids import DEFAULT_MODEL
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import AdamParams, OptimStep

router = APIRouter()
_DEFAULTS = AdamParams()


class ForwardBody(msgspec.Struct, forbid_unknown_fields=True):
    """The body of /forward_backward, and of /forward, which takes either name of its data. model and type mean nothing here."""

    forward_backward_input: ForwardInput | None = None
    forward_input: ForwardInput | None = None
    model_id: str | None = None
    session_id: str | None = None
    seq_id: int | None = None
    model: str | None = None
    type: str | None = None


_FORWARD = msgspec.json.Decoder(ForwardBody)
_DOCUMENTED = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"type": "object", "description": "see docs/xorl.md"}}},
    }
}


@router.post("/api/v1/forward_backward", openapi_extra=_DOCUMENTED)
async def forward_backward(request: Request) -> Response:
    """Loss and gradients of some datums, added to what the model has accumulated."""
    return await _train(request, backward=True)


@router.post("/api/v1/forward", openapi_extra=_DOCUMENTED)
async def forward(request: Request) -> Response:
    """Only the losses and log-probabilities."""
    return await _train(request, backward=False)


async def _train(request: Request, *, backward: bool) -> Response:
    parts = parts_of(request)
    async with raw_body(request, parts, max_bytes=parts.config.max_json_body_bytes) as raw:
        body = await offloaded(lambda: typed(_FORWARD, raw), size_bytes=len(raw))
        meant = target(_name(body), tenant=tenant_of(request))
        content = _content(body, backward=backward)
        card = await parts.catalog.card()
        max_datums = parts.config.max_datums
        job, digest = await offloaded(
            lambda: _encoded(content, card, backward=backward, max_datums=max_datums, is_named=body.seq_id is not None),
            size_bytes=len(raw),
        )
        return promised(meant, await submit(parts, meant, job, seq_id=body.seq_id, request_digest=digest))


def _name(body: ForwardBody) -> str:
    if body.model_id is not None and body.session_id not in {None, body.model_id}:
        raise InvalidRequest("model_id, session_id: they name different models; send one of them")
    return body.model_id or body.session_id or DEFAULT_MODEL


def _content(body: ForwardBody, *, backward: bool) -> ForwardInput:
    given = [body.forward_backward_input] if backward else [body.forward_input, body.forward_backward_input]
    found = [content for content in given if content is not None]
    if backward and body.forward_input is not None:
        raise InvalidRequest("forward_input: belongs to /api/v1/forward; send forward_backward_input")
    if len(found) != 1:
        field = "forward_backward_input" if backward else "forward_input"
        raise InvalidRequest(f"{field}: missing" if not found else f"{field}: sent under both of its names")
    return found[0]


def _encoded(
    content: ForwardInput, card: EngineCard, *, backward: bool, max_datums: int, is_named: bool
) -> tuple[Encoded, str]:
    """The job, and what it is known by when it is sent again: nothing unless the client names its requests."""
    job = encoded_training(to_payload(training_data(content, card, backward=backward, max_datums=max_datums), card))
    return job, digest_of(job.payload) if is_named else ""


class AdamBody(Body):
    """lr is another name for learning_rate. betas stands for beta1 and beta2."""

    learning_rate: Annotated[float, Field(ge=0)] | None = None
    lr: Annotated[float, Field(ge=0)] | None = None
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = None
    beta2: Annotated[float, Field(ge=0, lt=1)] | None = None
    eps: Annotated[float, Field(ge=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    grad_clip_norm: float | None = None


class OptimStepBody(NamedBody):
    """learning_rate and gradient_clip come before what adam_params says, and that before the model's optimizer_config."""

    adam_params: AdamBody | None = None
    learning_rate: Annotated[float, Field(ge=0)] | None = None
    lr: Annotated[float, Field(ge=0)] | None = None
    gradient_clip: float | None = None


@router.post("/api/v1/optim_step", openapi_extra=documents(OptimStepBody))
async def optim_step(request: Request) -> Response:
    """Applies the accumulated gradient once, divided by the tokens it is of, and clears it."""
    parts = parts_of(request)
    body = await small_body(request, OptimStepBody)
    meant = target_of(body, tenant=tenant_of(request))
    adam = adam_params(body, await _step_defaults(parts, meant))
    return promised(meant, await submit(parts, meant, OptimStep(adam=adam), seq_id=body.seq_id))


async def _step_defaults(parts: Parts, meant: Target) -> StepDefaults:
    """What the model was made with; the server's own for a model that is not there yet."""
    record = await parts.intake.record(RecordKind.MODEL, meant.model) or {}
    text = record.get("step_defaults")
    if not text or record.get("tenant") != meant.tenant:
        return StepDefaults()
    return msgspec.json.decode(text, type=StepDefaults)


def adam_params(body: OptimStepBody, defaults: StepDefaults) -> AdamParams:
    """The step's hyper-parameters: the request's, else those of the model's optimizer_config, else the server's.

    A clip of 0 or less means none. Raises InvalidRequest when a value has two names that differ, or is out of its range.
    """
    adam = body.adam_params or AdamBody()
    top_rate = _same(body.learning_rate, body.lr, "learning_rate, lr")
    adam_rate = _same(adam.learning_rate, adam.lr, "adam_params.learning_rate, adam_params.lr")
    clip = _first(body.gradient_clip, adam.grad_clip_norm, 0.0)
    asked = AdamParams(
        learning_rate=_first(top_rate, adam_rate, defaults.learning_rate, _DEFAULTS.learning_rate),
        beta1=_first(adam.beta1, defaults.beta1, _DEFAULTS.beta1),
        beta2=_first(adam.beta2, defaults.beta2, _DEFAULTS.beta2),
        eps=_first(adam.eps, defaults.eps, _DEFAULTS.eps),
        weight_decay=_first(adam.weight_decay, defaults.weight_decay, _DEFAULTS.weight_decay),
        grad_clip_norm=max(clip, 0.0),
    )
    check_adam(asked)
    return asked


def _same(one: float | None, other: float | None, names: str) -> float | None:
    if one is not None and other is not None and one != other:
        raise InvalidRequest(f"{names}: {one} and {other}; they mean the same, send one of them")
    return other if one is None else one


def _first(*values: float | None) -> float:
    """The first one that is there; the last one always is."""
    return next(value for value in values if value is not None)
