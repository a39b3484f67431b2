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
from gradstream.shared.wire import LoadWeights, Payload, SaveForSampler, SaveWeights

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
    raw = await small_bytes(request)
    body = parse_small(raw, SaveBody)
    if not body.save_optimizer:
        raise Unsupported(
            "save_optimizer: checkpoints always hold the optimizer's state; leave it out when loading: optimizer=false"
        )
    now_ms = parts_of(request).clock.wall_ms()
    name = f"checkpoint-{now_ms}" if body.path is None else checkpoint_name(body.path)
    return await _saving(request, raw, body, SaveWeights(name=name, overwrite=name == INITIAL_CHECKPOINT))


@router.post("/api/v1/save_weights_for_sampler", openapi_extra=documents(SaveForSamplerBody))
async def save_weights_for_sampler(request: Request) -> Response:
    """Saves the weights in the form that inference servers load. The job fails when the name is taken."""
    raw = await small_bytes(request)
    body = parse_small(raw, SaveForSamplerBody)
    given = body.path if body.name is None else body.name
    require(
        given is not None and (body.name is None or body.path is None or body.name == body.path),
        "name: send the checkpoint's name, as name or as path",
    )
    assert given is not None
    return await _saving(request, raw, body, SaveForSampler(name=checkpoint_name(given)))


@router.post("/api/v1/load_weights", openapi_extra=documents(LoadBody))
async def load_weights(request: Request) -> Response:
    """Puts a checkpoint into the model, unless told otherwise with its optimizer. The job fails when there is no such checkpoint."""
    raw = await small_bytes(request)
    body = parse_small(raw, LoadBody)
    require(
        body.optimizer is None or body.load_optimizer in (None, body.optimizer),
        "optimizer, load_optimizer: they mean the same and differ; send one of them",
    )
    with_optimizer = next((value for value in (body.optimizer, body.load_optimizer) if value is not None), True)
    meant = target_of(body, tenant=tenant_of(request))
    output_dir = parts_of(request).config.output_dir
    found = parse(body.path, of=meant, kind=WEIGHTS, field="path", output_dir=output_dir)
    return await _promise(request, raw, body, LoadWeights(path=found.uri, with_optimizer=with_optimizer))


async def _saving(request: Request, raw: bytes, body: NamedBody, payload: SaveWeights | SaveForSampler) -> Response:
    """The promise of a save, for a tenant that has room for it."""
    await check_storage_left(parts_of(request), tenant=tenant_of(request))
    return await _promise(request, raw, body, payload)


async def _promise(request: Request, raw: bytes, body: NamedBody, payload: Payload) -> Response:
    """The promise of a job of the body's model. Repetitions are known by the bytes, as a name may be made from the time."""
    meant = target_of(body, tenant=tenant_of(request))
    future = await submit(parts_of(request), meant, payload, seq_id=body.seq_id, request_digest=digest_of(raw))
    return promised(meant, future)
