"""Weights: saving checkpoints, loading them, and saving them for an inference server."""

from typing import ClassVar

from fastapi import APIRouter, Request, Response

from gradstream.api.auth import tenant_of
from gradstream.api.body import documents, parse_small, small_bytes
from gradstream.api.budgets import check_storage_left
from gradstream.api.errors import require
from gradstream.api.parts import parts_of
from gradstream.api.records import checkpoint_name
from gradstream.api.xorl.bodies import NamedBody
from gradstream.api.xorl.models import target_of
from gradstream.api.xorl.paths import WEIGHTS, parse
from gradstream.api.xorl.submitting import digest_of, promised, submit
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import INITIAL_CHECKPOINT
from gradstream.shared.wire import LoadWeights, SaveForSampler, SaveWeights

router = APIRouter()


class SaveBody(NamedBody):
    """path: the checkpoint's name; null makes one from the time. save_optimizer: checkpoints always hold the optimizer."""

    path: str | None = None
    save_optimizer: bool = True


class LoadBody(NamedBody):
    """optimizer and load_optimizer are the same: whether the optimizer's state comes back too, or starts fresh."""

    path: str
    optimizer: bool | None = None
    load_optimizer: bool | None = None


class SaveForSamplerBody(NamedBody):
    """name and path are the same: the checkpoint's name."""

    IDLE: ClassVar[frozenset[str]] = frozenset({"type"})

    name: str | None = None
    path: str | None = None


@router.post("/api/v1/save_weights", openapi_extra=documents(SaveBody))
async def save_weights(request: Request) -> Response:
    """Saves weights and optimizer as a checkpoint. The job fails when the name is taken."""
    parts = parts_of(request)
    raw = await small_bytes(request)
    body = parse_small(raw, SaveBody)
    meant = target_of(body, tenant=tenant_of(request))
    if not body.save_optimizer:
        raise Unsupported(
            "save_optimizer: checkpoints always hold the optimizer's state; leave it out when loading: optimizer=false"
        )
    name = f"checkpoint-{parts.clock.wall_ms()}" if body.path is None else checkpoint_name(body.path)
    await check_storage_left(parts, tenant=meant.tenant)
    payload = SaveWeights(name=name, overwrite=name == INITIAL_CHECKPOINT)
    future = await submit(parts, meant, payload, seq_id=body.seq_id, request_digest=digest_of(raw))
    return promised(meant, future)


@router.post("/api/v1/save_weights_for_sampler", openapi_extra=documents(SaveForSamplerBody))
async def save_weights_for_sampler(request: Request) -> Response:
    """Saves the weights in the form that inference servers load. The job fails when the name is taken."""
    parts = parts_of(request)
    raw = await small_bytes(request)
    body = parse_small(raw, SaveForSamplerBody)
    meant = target_of(body, tenant=tenant_of(request))
    given = body.path if body.name is None else body.name
    require(
        given is not None and (body.name is None or body.path is None or body.name == body.path),
        "name: send the checkpoint's name, as name or as path",
    )
    assert given is not None
    await check_storage_left(parts, tenant=meant.tenant)
    payload = SaveForSampler(name=checkpoint_name(given))
    future = await submit(parts, meant, payload, seq_id=body.seq_id, request_digest=digest_of(raw))
    return promised(meant, future)


@router.post("/api/v1/load_weights", openapi_extra=documents(LoadBody))
async def load_weights(request: Request) -> Response:
    """Puts a checkpoint into the model, unless told otherwise with its optimizer. The job fails when there is no such checkpoint."""
    parts = parts_of(request)
    raw = await small_bytes(request)
    body = parse_small(raw, LoadBody)
    meant = target_of(body, tenant=tenant_of(request))
    require(
        body.optimizer is None or body.load_optimizer in (None, body.optimizer),
        "optimizer, load_optimizer: they mean the same and differ; send one of them",
    )
    with_optimizer = next((value for value in (body.optimizer, body.load_optimizer) if value is not None), True)
    found = parse(body.path, of=meant, kind=WEIGHTS, field="path", output_dir=parts.config.output_dir)
    payload = LoadWeights(path=found.uri, with_optimizer=with_optimizer)
    future = await submit(parts, meant, payload, seq_id=body.seq_id, request_digest=digest_of(raw))
    return promised(meant, future)
