"""Models: making one, asking about one, and dropping one."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.budgets import check_model_room
from gradstream.api.catalog import check_base_model
from gradstream.api.errors import require
from gradstream.api.model_info import ModelInfo, model_info
from gradstream.api.ordered import Promise
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import open_session, own_record, text_metadata
from gradstream.api.tinker.answers import Answer
from gradstream.shared import codec, ids
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import DEFAULT_MODEL, UNLOAD_SEQ, ModelId, SessionId, TenantId
from gradstream.shared.joblog.port import RecordKind, Submission
from gradstream.shared.wire import CopyCheckpoint, CreateModel, LoadWeights, LoraSpec, OptimizerSpec, UnloadModel

router = APIRouter()
MAX_MODEL_SEQ_ID = 2**31 - 1
_SEED_RANGE = (-(2**63), 2**63 - 1)


class LoraBody(Body):
    rank: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=_SEED_RANGE[0], le=_SEED_RANGE[1])] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerBody(Body):
    """type names the optimizer; version belongs to dimuon."""

    type: str = "adamw"
    version: int | None = None


class CreateModelBody(Body):
    session_id: str
    model_seq_id: Annotated[int, Field(ge=0, le=MAX_MODEL_SEQ_ID)]
    base_model: str
    # Any: free-form JSON, kept as text.
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraBody | None = None
    optimizer_config: OptimizerBody | None = None
    type: Literal["create_model"] = "create_model"


class ModelBody(Body):
    model_id: str
    type: Literal["get_info", "unload_model"] | None = None


@router.post("/create_model", openapi_extra=documents(CreateModelBody))
async def create_model(request: Request) -> Answer:
    """A new adapter. The same (session_id, model_seq_id) with the same content is the same future."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, CreateModelBody)
    card = await parts.catalog.card()
    session = await open_session(parts, body.session_id, tenant=tenant)
    check_base_model(card, body.base_model)
    check_optimizer(body.optimizer_config)
    lora = _lora_spec(body.lora_config, card)
    payload = CreateModel(
        session_id=session,
        base_model=body.base_model,
        lora=lora,
        user_metadata=text_metadata(body.user_metadata),
        optimizer=_optimizer_spec(body.optimizer_config, card),
    )
    record = {
        "base_model": body.base_model,
        "rank": str(lora.rank),
        "seed": "" if lora.seed is None else str(lora.seed),
        "train_attn": str(int(lora.train_attn)),
        "train_mlp": str(int(lora.train_mlp)),
        "train_unembed": str(int(lora.train_unembed)),
    }
    return Answer(
        await submit_creation(
            parts, payload, session=session, model_seq_id=body.model_seq_id, tenant=tenant, fields=record
        )
    )


async def submit_creation(
    parts: Parts,
    payload: CreateModel | LoadWeights | CopyCheckpoint,
    *,
    session: SessionId,
    model_seq_id: int,
    tenant: TenantId,
    fields: Mapping[str, str],
) -> Promise:
    """The promise of job seq 0 of a new model, whose record is made with it."""
    model = ids.model_id(session, model_seq_id)
    await check_model_room(parts, model, tenant=tenant)
    metadata = None if isinstance(payload, CopyCheckpoint) else payload.user_metadata
    record = {
        "session": session,
        "tenant": tenant,
        "user_metadata": json.dumps(metadata or {}),
        "created_ms": str(parts.clock.wall_ms()),
        **fields,
    }
    receipt = await parts.admission.submit(
        Submission(
            owner=model,
            seq=0,
            op=codec.op_of(payload),
            tenant=tenant,
            payload=codec.encode(payload),
            model_record=record,
        )
    )
    return Promise(request_id=receipt.future_id, model_id=model)


def check_optimizer(optimizer: OptimizerBody | None) -> None:
    """Raise Unsupported for any optimizer but AdamW."""
    if optimizer is not None and optimizer.type != "adamw":
        why = ", since its update rule is not published" if optimizer.type == "dimuon" else ""
        raise Unsupported(f"optimizer_config.type: {optimizer.type!r} is not offered here{why}; use 'adamw'")


def _optimizer_spec(optimizer: OptimizerBody | None, card: EngineCard) -> OptimizerSpec | None:
    """AdamW where the client names it on a server whose own optimizer is another; None is the server's."""
    if optimizer is None or card.optimizer.type == optimizer.type:
        return None
    return OptimizerSpec(dtype=card.optimizer.dtype)


def _lora_spec(lora: LoraBody | None, card: EngineCard) -> LoraSpec:
    if not card.is_lora:
        raise Unsupported(
            f"lora_config: this server trains the full weights of one model, {DEFAULT_MODEL!r}, for clients of the xorl API; "
            "adapters need a server with enable_lora: true"
        )
    max_rank = card.max_lora_rank
    if lora is None:
        raise InvalidRequest('lora_config: missing; this server trains LoRA adapters, so send at least {"rank": 32}')
    require(lora.rank <= max_rank, f"lora_config.rank: {lora.rank} is more than {max_rank}, the largest rank here")
    require(
        lora.train_attn or lora.train_mlp or lora.train_unembed,
        "lora_config: train_attn, train_mlp and train_unembed are all false; set at least one",
    )
    return LoraSpec(
        rank=lora.rank,
        seed=lora.seed,
        train_attn=lora.train_attn,
        train_mlp=lora.train_mlp,
        train_unembed=lora.train_unembed,
    )


@router.post("/get_info", openapi_extra=documents(ModelBody))
async def get_info(request: Request) -> ModelInfo:
    """What a model is, and which tokenizer belongs to it."""
    parts = parts_of(request)
    body = await small_body(request, ModelBody)
    record = await own_record(parts, RecordKind.MODEL, body.model_id, tenant=tenant_of(request), field="model_id")
    card = await parts.catalog.card()
    return model_info(record, card, model_id=body.model_id, tokenizer_id=card.tokenizer_id)


@router.post("/unload_model", openapi_extra=documents(ModelBody))
async def unload_model(request: Request) -> Answer:
    """Drops a model; older SDKs send it. It has no seq_id, so one model has one unload, and its future is always the same."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, ModelBody)
    await own_record(parts, RecordKind.MODEL, body.model_id, tenant=tenant, field="model_id")
    model = ModelId(body.model_id)
    payload = UnloadModel()
    receipt = await parts.admission.submit(
        Submission(
            owner=model,
            seq=UNLOAD_SEQ,
            op=codec.op_of(payload),
            tenant=tenant,
            payload=codec.encode(payload),
            ordered=False,
        )
    )
    return Answer(Promise(request_id=receipt.future_id, model_id=model))
