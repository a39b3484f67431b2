"""Sampling: samplers, and asample, which continues one prompt."""

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, offloaded, raw_body, small_body
from gradstream.api.budgets import check_sampler_room
from gradstream.api.catalog import base_model_name
from gradstream.api.config import ApiConfig
from gradstream.api.errors import require
from gradstream.api.ordered import Promise
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import checkpoint_path, open_session, own_record
from gradstream.api.tinker.answers import Answer
from gradstream.api.tinker.sampling_body import SampleBody, parse_sample, sample_payload
from gradstream.api.tinker.weights import SAMPLER_KIND
from gradstream.shared import codec, ids
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest, SequenceConflict, UnknownModel
from gradstream.shared.ids import SamplerId, TenantId
from gradstream.shared.joblog.port import RecordKind, Submission

router = APIRouter()
_MAX_SEQ = 2**63 - 1
# With this header the client counts its own requests in flight and takes a 429 as a sign to send fewer.
_BACKPRESSURE_HEADER = "x-tinker-sampling-backpressure"


class CreateSamplingSessionBody(Body):
    """base_model samples the base; model_path samples a checkpoint, and then base_model may be left out."""

    session_id: str
    sampling_session_seq_id: Annotated[int, Field(ge=0, le=_MAX_SEQ)]
    base_model: str | None = None
    model_path: str | None = None
    type: Literal["create_sampling_session"] = "create_sampling_session"


class SamplingSession(BaseModel):
    type: str = "create_sampling_session"
    sampling_session_id: str


class Sampler(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    sampler_id: str
    base_model: str
    model_path: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Whose weights a request samples, and under which owner and seq."""

    owner: SamplerId
    seq: int
    path: str | None


@router.post("/create_sampling_session", openapi_extra=documents(CreateSamplingSessionBody))
async def create_sampling_session(request: Request) -> SamplingSession:
    """A sampler. The same (session_id, sampling_session_seq_id) with the same content is the same sampler."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, CreateSamplingSessionBody)
    session = await open_session(parts, body.session_id, tenant=tenant)
    base_model = await _checked_base(parts, body.base_model, body.model_path, tenant=tenant)
    sampler = ids.sampler_id(session, body.sampling_session_seq_id)
    await check_sampler_room(parts, sampler, tenant=tenant)
    identity = {"session": session, "tenant": tenant, "base_model": base_model, "model_path": body.model_path or ""}
    fields = {**identity, "created_ms": str(parts.clock.wall_ms())}
    if not await parts.intake.add_record(RecordKind.SAMPLER, sampler, fields):
        existing = await parts.intake.record(RecordKind.SAMPLER, sampler) or {}
        if any(existing.get(name) != value for name, value in identity.items()):
            raise SequenceConflict(
                f"sampling_session_seq_id: {body.sampling_session_seq_id} already names another sampler of this session; "
                "use the next number"
            )
    return SamplingSession(sampling_session_id=sampler)


async def _checked_base(parts: Parts, base_model: str | None, model_path: str | None, *, tenant: TenantId) -> str:
    """The base model's name, after names and path were checked."""
    card = await parts.catalog.card()
    require(base_model is not None or model_path is not None, "base_model, model_path: send at least one")
    checkpoint: Mapping[str, str] = {}
    if model_path is not None:
        checkpoint_path(model_path, kind=SAMPLER_KIND, field="model_path")
        checkpoint = await own_record(parts, RecordKind.CHECKPOINT, model_path, tenant=tenant, field="model_path")
    return base_model_name(card, base_model, saved=checkpoint.get("base_model"))


@router.get("/samplers/{sampler_id:path}")
async def get_sampler(sampler_id: str, request: Request) -> Sampler:
    """What a sampler samples."""
    parts = parts_of(request)
    record = await own_record(parts, RecordKind.SAMPLER, sampler_id, tenant=tenant_of(request), field="sampler_id")
    base_model = record.get("base_model") or (await parts.catalog.card()).model_name
    return Sampler(sampler_id=sampler_id, base_model=base_model, model_path=record.get("model_path") or None)


@router.post("/asample")
async def asample(request: Request) -> Answer:
    """Continues a prompt num_samples times.

    With a sampling session, the same (sampling_session_id, seq_id) with the same content is the same future; without one, the same
    X-Idempotency-Key is. A full queue answers 429 at once to clients that announce that they handle it.
    """
    parts, tenant = parts_of(request), tenant_of(request)
    async with raw_body(request, parts, max_bytes=parts.config.max_json_body_bytes) as raw:
        body = await offloaded(lambda: parse_sample(raw), size_bytes=len(raw))
        card = await parts.catalog.card()
        target = await _target(parts, body, request, tenant=tenant)
        submission = await offloaded(
            lambda: _submission(body, target, card, config=parts.config, tenant=tenant), size_bytes=len(raw)
        )
    receipt = await parts.admission.submit(submission, hold=_BACKPRESSURE_HEADER not in request.headers)
    return Answer(
        Promise(
            request_id=receipt.future_id,
            sample_sequence_ids=[f"{receipt.future_id}:{index}" for index in range(body.num_samples)],
        )
    )


def _submission(
    body: SampleBody, target: _Target, card: EngineCard, *, config: ApiConfig, tenant: TenantId
) -> Submission:
    payload = sample_payload(body, path=target.path, card=card, config=config)
    num_prompt_tokens = len(payload.prompt) // np.dtype("<i4").itemsize
    return Submission(
        owner=target.owner,
        seq=target.seq,
        op=codec.op_of(payload),
        tenant=tenant,
        payload=codec.encode(payload),
        num_tokens=num_prompt_tokens + payload.num_samples * payload.params.max_tokens,
        ordered=False,
    )


async def _target(parts: Parts, body: SampleBody, request: Request, *, tenant: TenantId) -> _Target:
    if body.sampling_session_id is not None:
        if body.base_model is not None or body.model_path is not None:
            raise InvalidRequest(
                "base_model, model_path: a sampling session has its own; leave them out beside sampling_session_id"
            )
        if body.seq_id is None:
            raise InvalidRequest("seq_id: missing; number the requests of a sampling session 0, 1, 2 and so on")
        require(0 <= body.seq_id <= _MAX_SEQ, f"seq_id: {body.seq_id} is not between 0 and {_MAX_SEQ}")
        record = await own_record(
            parts, RecordKind.SAMPLER, body.sampling_session_id, tenant=tenant, field="sampling_session_id"
        )
        path = record.get("model_path") or None
        await _check_still_there(parts, path)
        return _Target(owner=SamplerId(body.sampling_session_id), seq=body.seq_id, path=path)
    await _checked_base(parts, body.base_model, body.model_path, tenant=tenant)
    return _Target(owner=_direct_owner(request, body, tenant=tenant), seq=0, path=body.model_path)


async def _check_still_there(parts: Parts, path: str | None) -> None:
    """Raise UnknownModel when a sampler's named checkpoint is gone, also while the gang still has it in memory."""
    if path is None or f"/{SAMPLER_KIND}/" not in path:
        return
    if await parts.intake.record(RecordKind.CHECKPOINT, path) is None:
        raise UnknownModel(f"sampling_session_id: the checkpoint {path} of this sampler was deleted, or has expired")


def _direct_owner(request: Request, body: SampleBody, *, tenant: TenantId) -> SamplerId:
    """The owner of a sample without a session: from the client's idempotency key and the content, or new each time."""
    key = request.headers.get("x-idempotency-key")
    if key is None:
        return SamplerId(f"direct:sample:{uuid.uuid4().hex}")
    content = msgspec.msgpack.encode((tenant, key, body))
    return SamplerId(f"direct:sample:{hashlib.blake2b(content, digest_size=16).hexdigest()}")
