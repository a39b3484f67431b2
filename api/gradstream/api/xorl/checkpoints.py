"""Checkpoints after they were saved: listing, deleting, and what one holds."""

import json
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from gradstream.api import storage
from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.catalog import base_model_name
from gradstream.api.checkpoint_views import checkpoint_view
from gradstream.api.names import Target, shown, target
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import Record, own_record
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.models import record_of, target_of
from gradstream.api.xorl.paths import SAMPLER_WEIGHTS, WEIGHTS, CheckpointName, parse, parse_id
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import DEFAULT_MODEL
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
_MAX_OF_MODEL = 10_000


class ModelBody(NamedBody):
    """A model, nothing else."""


class DeleteBody(NamedBody):
    """checkpoint_id: KIND/NAME as in the list, KIND/MODEL/NAME, or the checkpoint's URI."""

    checkpoint_id: str


class WeightsInfoBody(Body):
    """xorl_path: the checkpoint, in any spelling that names its model."""

    xorl_path: str
    model: str | None = None


class ListedCheckpoint(BaseModel):
    checkpoint_id: str
    checkpoint_type: str
    time: datetime
    path: str
    size_bytes: int | None


class ListedCheckpoints(BaseModel):
    checkpoints: list[ListedCheckpoint]


class CheckpointDeleted(BaseModel):
    success: bool
    deleted_path: str | None = None
    error: str | None = None


class XorlWeightsInfo(BaseModel):
    """What a model must be made with for the checkpoint to fit. lora_rank and lora_config: null for full weights."""

    base_model: str
    is_lora: bool
    lora_rank: int | None
    # Any: free-form JSON.
    lora_config: dict[str, Any] | None
    optimizer_config: dict[str, Any] | None


@router.post("/api/v1/list_checkpoints", openapi_extra=documents(ModelBody))
async def list_checkpoints(request: Request) -> ListedCheckpoints:
    """All checkpoints of one model, newest first."""
    parts = parts_of(request)
    meant = target_of(await small_body(request, ModelBody), tenant=tenant_of(request))
    # The model that may be used without being made has no checkpoints before that.
    if not meant.is_default:
        await record_of(parts, meant)
    page = await parts.intake.list_children(RecordKind.CHECKPOINT, meant.model, offset=0, limit=_MAX_OF_MODEL)
    listed = []
    for uri, record in page.records.items():
        view = checkpoint_view(uri, record)
        listed.append(
            ListedCheckpoint(
                checkpoint_id=view.checkpoint_id,
                checkpoint_type=view.checkpoint_type,
                time=view.time,
                path=shown(uri),
                size_bytes=view.size_bytes,
            )
        )
    return ListedCheckpoints(checkpoints=listed)


@router.post("/api/v1/delete_checkpoint", openapi_extra=documents(DeleteBody))
async def delete_checkpoint(request: Request) -> CheckpointDeleted:
    """Nobody can load the checkpoint from now on; its files go when the worker comes to it."""
    parts = parts_of(request)
    body = await small_body(request, DeleteBody)
    meant = target_of(body, tenant=tenant_of(request))
    found = parse_id(body.checkpoint_id, of=meant, field="checkpoint_id")
    record = await _own(parts, found, of=meant, field="checkpoint_id")
    await storage.delete_checkpoint(parts, found.uri, record, tenant=meant.tenant)
    return CheckpointDeleted(success=True, deleted_path=shown(found.uri))


@router.post("/api/v1/weights_info", openapi_extra=documents(WeightsInfoBody))
async def weights_info(request: Request) -> XorlWeightsInfo:
    """What a checkpoint holds; clients ask before they make a model for it."""
    parts = parts_of(request)
    body = await small_body(request, WeightsInfoBody)
    of = target(DEFAULT_MODEL, tenant=tenant_of(request))
    found = _either_kind(parts, body.xorl_path, of=of)
    record = await _own(parts, found, of=of, field="xorl_path")
    card = await parts.catalog.card()
    rank = record.get("rank") or None
    return XorlWeightsInfo(
        base_model=base_model_name(card, None, saved=record.get("base_model")),
        is_lora=rank is not None,
        lora_rank=None if rank is None else int(rank),
        lora_config=None if rank is None else _lora(record),
        optimizer_config=json.loads(record.get("optimizer") or "null"),
    )


def _either_kind(parts: Parts, text: str, *, of: Target) -> CheckpointName:
    """The training or sampler checkpoint that text names."""
    kind = SAMPLER_WEIGHTS if SAMPLER_WEIGHTS in text.split("/") else WEIGHTS
    return parse(text, of=of, kind=kind, field="xorl_path", output_dir=parts.config.output_dir)


# Any: free-form JSON.
def _lora(record: Record) -> dict[str, Any]:
    """rank, and alpha where the record has it."""
    alpha = record.get("alpha")
    return {"rank": int(record["rank"]), **({"alpha": float(alpha)} if alpha else {})}


async def _own(parts: Parts, found: CheckpointName, *, of: Target, field: str) -> Record:
    """The checkpoint's record; raises UnknownModel when there is none, or when it is another tenant's."""
    try:
        return await own_record(parts, RecordKind.CHECKPOINT, found.uri, tenant=of.tenant, field=field)
    except UnknownModel as error:
        raise UnknownModel(shown(error.message)) from error
