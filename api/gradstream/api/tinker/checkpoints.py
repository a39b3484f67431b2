"""Checkpoints after they were saved: listing, deleting, publishing, time to live.

A checkpoint's id is `KIND/NAME` and stands in the path with its slash, so routes with a suffix come before the one without.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api import storage
from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.checkpoint_views import Checkpoint, checkpoint_view
from gradstream.api.errors import require
from gradstream.api.parts import Parts, parts_of
from gradstream.api.query import PageQuery, Query, query, takes
from gradstream.api.records import Record, any_checkpoint_path, own_record
from gradstream.api.tinker.views import Cursor
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
_ONE = "/training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
_MAX_TTL_S = 10 * 366 * 24 * 3600
LongTtl = Annotated[int, Field(ge=3600, le=_MAX_TTL_S)]
# A run's checkpoints come in one answer, as the SDK expects; a run has rarely more than some hundreds.
_MAX_OF_RUN = 10_000
_NO_CONTENT = 204


class TtlBody(Body):
    """null: the checkpoint stays until it is deleted."""

    ttl_seconds: LongTtl | None


class Checkpoints(BaseModel):
    checkpoints: list[Checkpoint]
    cursor: Cursor | None = None


@router.get("/checkpoints", openapi_extra=takes(PageQuery))
async def list_checkpoints(request: Request) -> Checkpoints:
    """A page of all of the caller's checkpoints, newest first."""
    parts = parts_of(request)
    asked = query(request, PageQuery)
    page = await parts.intake.list_tenant(
        RecordKind.CHECKPOINT, tenant_of(request), offset=asked.offset, limit=asked.page
    )
    return Checkpoints(
        checkpoints=[checkpoint_view(path, record) for path, record in page.records.items()],
        cursor=Cursor(offset=asked.offset, limit=asked.page, total_count=page.total),
    )


@router.get("/training_runs/{run_id}/checkpoints", openapi_extra=takes(Query))
async def list_checkpoints_of_run(run_id: str, request: Request) -> Checkpoints:
    """All checkpoints of one run, newest first."""
    parts, tenant = parts_of(request), tenant_of(request)
    query(request, Query)
    await own_record(parts, RecordKind.MODEL, run_id, tenant=tenant, field="training_run_id")
    page = await parts.intake.list_children(RecordKind.CHECKPOINT, run_id, offset=0, limit=_MAX_OF_RUN)
    return Checkpoints(checkpoints=[checkpoint_view(path, record) for path, record in page.records.items()])


@router.put(f"{_ONE}/ttl", status_code=_NO_CONTENT, openapi_extra=documents(TtlBody))
async def set_ttl(run_id: str, checkpoint_id: str, request: Request) -> Response:
    """The checkpoint expires ttl_seconds from now, or never."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, TtlBody)
    path, _ = await _own(parts, run_id, checkpoint_id, tenant=tenant)
    if body.ttl_seconds is not None:
        storage.check_may_go(path)
    expires_ms = "" if body.ttl_seconds is None else str(parts.clock.wall_ms() + 1000 * body.ttl_seconds)
    await _change(parts, path, {"expires_ms": expires_ms})
    return Response(status_code=_NO_CONTENT)


@router.post(f"{_ONE}/publish", status_code=_NO_CONTENT)
async def publish(run_id: str, checkpoint_id: str, request: Request) -> Response:
    """Marks the checkpoint public; 400 when it is. The mark is shown in lists; it opens the checkpoint to nobody else."""
    return await _mark(request, run_id, checkpoint_id, is_public=True)


@router.delete(f"{_ONE}/publish", status_code=_NO_CONTENT)
async def unpublish(run_id: str, checkpoint_id: str, request: Request) -> Response:
    """Takes the mark back; 400 when there is none."""
    return await _mark(request, run_id, checkpoint_id, is_public=False)


@router.delete(_ONE, status_code=_NO_CONTENT)
async def delete_checkpoint(run_id: str, checkpoint_id: str, request: Request) -> Response:
    """Nobody can load the checkpoint from now on; its files go when the worker comes to it, after what the run had queued before.

    403 for 000000 of a model that a xorl client named, which began with it.
    """
    parts, tenant = parts_of(request), tenant_of(request)
    path, record = await _own(parts, run_id, checkpoint_id, tenant=tenant)
    await storage.delete_checkpoint(parts, path, record, tenant=tenant)
    return Response(status_code=_NO_CONTENT)


async def _mark(request: Request, run_id: str, checkpoint_id: str, *, is_public: bool) -> Response:
    parts = parts_of(request)
    path, record = await _own(parts, run_id, checkpoint_id, tenant=tenant_of(request))
    state = "public" if is_public else "private"
    # A conflict by nature; but the SDK repeats every 409 for five minutes, silently.
    require((record.get("public") == "1") != is_public, f"checkpoint_id: checkpoint {path} is {state} already")
    await _change(parts, path, {"public": str(int(is_public))})
    return Response(status_code=_NO_CONTENT)


async def _own(parts: Parts, run_id: str, checkpoint_id: str, *, tenant: TenantId) -> tuple[str, Record]:
    """The checkpoint's URI and record; raises UnknownModel when there is none, or when it is another tenant's."""
    path = any_checkpoint_path(run_id, checkpoint_id)
    return path, await own_record(parts, RecordKind.CHECKPOINT, path, tenant=tenant, field="checkpoint_id")


async def _change(parts: Parts, path: str, fields: dict[str, str]) -> None:
    if not await parts.intake.change_record(RecordKind.CHECKPOINT, path, fields):
        raise UnknownModel(f"checkpoint_id: there is no checkpoint {path!r}")
