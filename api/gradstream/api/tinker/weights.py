"""Weights: saving checkpoints, loading them, and freezing them for a sampler."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, parse_small, small_body, small_bytes
from gradstream.api.budgets import check_sampler_room, check_storage_room
from gradstream.api.catalog import base_model_name
from gradstream.api.errors import require
from gradstream.api.ordered import (
    LANED,
    OrderedBody,
    Place,
    Promise,
    caller_of,
    ordered_body,
    place_in_json,
    place_of,
    refusing,
    submit_at,
)
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import checkpoint_name, checkpoint_path, open_session, own_record, text_metadata
from gradstream.api.tinker.answers import Answer
from gradstream.api.tinker.models import MAX_MODEL_SEQ_ID, OptimizerBody, check_optimizer, submit_creation
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import SessionId, TenantId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import LoadWeights, SaveForSampler, SaveWeights

router = APIRouter()
TRAINING_KIND = "weights"
SAMPLER_KIND = "sampler_weights"
_MAX_TTL_S = 10 * 366 * 24 * 3600
Ttl = Annotated[int, Field(ge=1, le=_MAX_TTL_S)]
# Fields of a checkpoint's record that a model made from it takes over.
INHERITED = ("rank", "seed", "train_attn", "train_mlp", "train_unembed")


class SaveWeightsBody(OrderedBody):
    """path is the checkpoint's name; without it the name is made from seq_id."""

    path: str | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    # Any: free-form JSON, kept as text.
    user_metadata: dict[str, Any] | None = None
    type: Literal["save_weights"] = "save_weights"


class SaveForSamplerBody(OrderedBody):
    """path for a named checkpoint, sampling_session_seq_id for an ephemeral one.

    kind inflight lets a server move older handles to newer weights; here each handle keeps its own, which is also allowed.
    """

    path: str | None = None
    sampling_session_seq_id: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Ttl | None = None
    user_metadata: dict[str, Any] | None = None
    type: Literal["save_weights_for_sampler"] = "save_weights_for_sampler"


class LoadWeightsBody(Body):
    """In place with model_id and seq_id; as a new model with session_id and model_seq_id."""

    path: str
    optimizer: bool
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: Annotated[int, Field(ge=0, le=MAX_MODEL_SEQ_ID)] | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: OptimizerBody | None = None
    weights_access_token: str | None = None
    type: Literal["load_weights"] = "load_weights"


class WeightsInfoBody(Body):
    tinker_path: str


class WeightsInfo(BaseModel):
    """Full weights have no lora_rank."""

    base_model: str
    is_lora: bool = True
    lora_rank: int | None
    train_unembed: bool
    train_mlp: bool
    train_attn: bool


@router.post("/save_weights", openapi_extra=documents(SaveWeightsBody) | LANED)
async def save_weights(request: Request) -> Answer:
    """Saves adapter and optimizer. The same (model_id, seq_id) with the same content is the same future."""
    parts = parts_of(request)
    body, place = await ordered_body(request, SaveWeightsBody)
    async with refusing(parts, place):
        await check_storage_room(parts, place)
        payload = SaveWeights(
            name=place.checkpoint if body.path is None else checkpoint_name(body.path),
            overwrite=body.overwrite,
            ttl_seconds=body.ttl_seconds,
            user_metadata=text_metadata(body.user_metadata),
        )
    return Answer(await submit_at(parts, place, payload))


@router.post("/save_weights_for_sampler", openapi_extra=documents(SaveForSamplerBody) | LANED)
async def save_weights_for_sampler(request: Request) -> Answer:
    """Freezes the adapter for sampling. The same (model_id, seq_id) with the same content is the same future."""
    parts = parts_of(request)
    body, place = await ordered_body(request, SaveForSamplerBody)
    async with refusing(parts, place):
        payload = await _save_for_sampler(parts, body, place)
    return Answer(await submit_at(parts, place, payload))


async def _save_for_sampler(parts: Parts, body: SaveForSamplerBody, place: Place) -> SaveForSampler:
    record = await own_record(parts, RecordKind.MODEL, place.model, tenant=place.tenant, field="model_id")
    session = SessionId(record["session"])
    metadata = text_metadata(body.user_metadata)
    match body.path, body.sampling_session_seq_id:
        case str(path), None:
            await check_storage_room(parts, place)
            return SaveForSampler(
                name=checkpoint_name(path), session_id=session, ttl_seconds=body.ttl_seconds, user_metadata=metadata
            )
        case None, int(seq):
            sampler = ids.sampler_id(session, _sampler_number(seq, lane=place.lane))
            await check_sampler_room(parts, sampler, tenant=place.tenant, place=place)
            return SaveForSampler(
                sampler_id=sampler,
                session_id=session,
                ttl_seconds=body.ttl_seconds,
                user_metadata=metadata,
            )
        case _:
            raise InvalidRequest(
                "path, sampling_session_seq_id: send exactly one; path names a checkpoint, sampling_session_seq_id makes a "
                "sampler without one"
            )


def _sampler_number(seq: int, *, lane: int) -> int:
    """Each process counts its samplers from 0, and all are named in the session of the model, so they need their lane too."""
    require(
        lane == 0 or seq < ids.LANE_SEQS,
        f"sampling_session_seq_id: {seq} is more than {ids.LANE_SEQS - 1}, the largest in a lane other than 0",
    )
    return ids.seq_in_lane(lane, seq)


@router.post("/weights_info", openapi_extra=documents(WeightsInfoBody))
async def weights_info(request: Request) -> WeightsInfo:
    """What a checkpoint holds; older SDKs ask before they make a model from one."""
    parts = parts_of(request)
    body = await small_body(request, WeightsInfoBody)
    record = await own_record(
        parts, RecordKind.CHECKPOINT, body.tinker_path, tenant=tenant_of(request), field="tinker_path"
    )
    card = await parts.catalog.card()
    return WeightsInfo(
        base_model=base_model_name(card, None, saved=record.get("base_model")),
        is_lora=record["rank"] != "",
        lora_rank=int(record["rank"]) if record["rank"] else None,
        train_unembed=record.get("train_unembed") != "0",
        train_mlp=record.get("train_mlp") != "0",
        train_attn=record.get("train_attn") != "0",
    )


@router.post("/load_weights", openapi_extra=documents(LoadWeightsBody) | LANED)
async def load_weights(request: Request) -> Answer:
    """Puts a checkpoint into a model, or makes a model from one. The same request is the same future."""
    parts, caller = parts_of(request), caller_of(request)
    raw = await small_bytes(request)
    async with refusing(parts, place_in_json(raw, caller=caller)):
        body = parse_small(raw, LoadWeightsBody)
        _check_target(body)
        if body.weights_access_token is not None:
            raise Unsupported(
                "weights_access_token: this server gives no access to other owners' weights; leave it out"
            )
        checkpoint_path(body.path, kind=TRAINING_KIND, field="path")
        check_optimizer(body.optimizer_config)
    if body.model_id is not None:
        place = place_of(body.model_id, body.seq_id, caller=caller)
        return Answer(await submit_at(parts, place, LoadWeights(path=body.path, with_optimizer=body.optimizer)))
    return Answer(await _create_from(parts, body, tenant=caller.tenant))


def _check_target(body: LoadWeightsBody) -> None:
    in_place = body.model_id is not None and body.seq_id is not None
    creates = body.session_id is not None and body.model_seq_id is not None
    is_mixed = (body.model_id is not None or body.seq_id is not None) and (
        body.session_id is not None or body.model_seq_id is not None
    )
    require(
        (in_place or creates) and not is_mixed,
        "model_id, seq_id, session_id, model_seq_id: send model_id and seq_id to load into a model, or session_id and "
        "model_seq_id to make one",
    )


async def _create_from(parts: Parts, body: LoadWeightsBody, *, tenant: TenantId) -> Promise:
    """The promise of a new model made from a checkpoint, whose adapter decides rank and layers."""
    assert body.session_id is not None
    assert body.model_seq_id is not None
    card = await parts.catalog.card()
    session = await open_session(parts, body.session_id, tenant=tenant)
    checkpoint = await own_record(parts, RecordKind.CHECKPOINT, body.path, tenant=tenant, field="path")
    base_model = base_model_name(card, body.base_model, saved=checkpoint.get("base_model"))
    payload = LoadWeights(
        path=body.path,
        with_optimizer=body.optimizer,
        create=True,
        session_id=session,
        user_metadata=text_metadata(body.user_metadata),
    )
    inherited = {name: checkpoint[name] for name in INHERITED if name in checkpoint}
    return await submit_creation(
        parts,
        payload,
        session=session,
        model_seq_id=body.model_seq_id,
        tenant=tenant,
        fields={"base_model": base_model, **inherited},
    )
