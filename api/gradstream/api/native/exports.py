"""Exports: a checkpoint as a model that needs no adapter, made by housekeeping and fetched as plain files."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.budgets import check_export_room
from gradstream.api.errors import require
from gradstream.api.files import files_of
from gradstream.api.links import make_link
from gradstream.api.parts import Parts, parts_of
from gradstream.api.query import PageQuery, query, takes
from gradstream.api.records import checkpoint_of, own_record
from gradstream.shared.errors import UnknownModel
from gradstream.shared.exports import QUEUE, ExportState, export_directory, export_id
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import RecordKind

router = APIRouter(prefix="/gradstream")
_NO_CONTENT = 204
_MAX_TTL_S = 10 * 366 * 24 * 3600
_DAY_S = 24 * 3600


class ExportBody(Body):
    """path: a checkpoint of any kind. ttl_seconds: how long the files are kept once they are asked for, counted anew by each request."""

    path: str
    format: Literal["merged"] = "merged"
    ttl_seconds: Annotated[int, Field(ge=3600, le=_MAX_TTL_S)] = 7 * _DAY_S


class Export(BaseModel):
    """progress: from 0 to 1. directory: below the server's output_dir. error: why it failed."""

    export_id: str
    path: str
    format: str
    state: ExportState
    progress: float
    created_at: datetime
    expires_at: datetime
    size_bytes: int | None = None
    directory: str | None = None
    error: str | None = None


class Exports(BaseModel):
    exports: list[Export]
    total_count: int


class ExportUrls(BaseModel):
    """archive: all files as one tar."""

    urls: dict[str, str]
    archive: str
    expires: datetime


@router.post("/exports", openapi_extra=documents(ExportBody))
async def export_checkpoint(request: Request) -> Export:
    """Has a checkpoint merged into its base model, as a Hugging Face directory. The same save is the same export; one that failed is tried again."""
    parts, tenant = parts_of(request), tenant_of(request)
    body = await small_body(request, ExportBody)
    place = checkpoint_of(body.path, field="path")
    saved = await own_record(parts, RecordKind.CHECKPOINT, body.path, tenant=tenant, field="path")
    export = export_id(ModelId(place.run), body.path, created_ms=saved["created_ms"], form=body.format)
    now_ms = parts.clock.wall_ms()
    expires_ms = str(now_ms + 1000 * body.ttl_seconds)
    known = await parts.intake.record(RecordKind.EXPORT, export)
    if known is None:
        await check_export_room(parts, tenant=tenant)
        fields = {
            "tenant": tenant,
            "queue": QUEUE,
            "path": body.path,
            "saved_ms": saved["created_ms"],
            "format": body.format,
        }
        fields |= {"created_ms": str(now_ms), "expires_ms": expires_ms, "directory": export_directory(export), **_ANEW}
        await parts.intake.add_record(RecordKind.EXPORT, export, fields)
    else:
        anew = _ANEW if known.get("state") == ExportState.FAILED else {}
        await parts.intake.change_record(RecordKind.EXPORT, export, {"expires_ms": expires_ms, **anew})
    return _view(export, await own_record(parts, RecordKind.EXPORT, export, tenant=tenant, field="path"))


@router.get("/exports", openapi_extra=takes(PageQuery))
async def list_exports(request: Request) -> Exports:
    """A page of the caller's exports, newest first."""
    asked = query(request, PageQuery)
    page = await parts_of(request).intake.list_tenant(
        RecordKind.EXPORT, tenant_of(request), offset=asked.offset, limit=asked.page
    )
    return Exports(exports=[_view(name, record) for name, record in page.records.items()], total_count=page.total)


@router.get("/exports/{export}")
async def get_export(export: str, request: Request) -> Export:
    """How far an export is."""
    return _view(export, await _own(parts_of(request), export, request))


@router.get("/exports/{export}/urls")
async def export_urls(export: str, request: Request) -> ExportUrls:
    """A URL for each file of a finished export, for an hour. Who has a URL needs no key."""
    parts = parts_of(request)
    record = await _own(parts, export, request)
    state = record["state"]
    require(state == ExportState.DONE, f"export: {export} is {state}; it can be fetched when it is {ExportState.DONE}")
    files = files_of(record, output_dir=parts.config.output_dir)
    link = await make_link(parts, request, export, record, kind=RecordKind.EXPORT)
    urls = {name: f"{link.base}/{name}" for name in files.sizes}
    return ExportUrls(urls=urls, archive=f"{link.base}/archive.tar", expires=link.expires)


@router.delete("/exports/{export}", status_code=_NO_CONTENT)
async def delete_export(export: str, request: Request) -> Response:
    """The export can be fetched no more, and is not made if it was not yet; its files go within minutes."""
    parts = parts_of(request)
    await _own(parts, export, request)
    if not await parts.intake.remove_record(RecordKind.EXPORT, export):
        raise UnknownModel(f"export: there is no export {export[:200]!r}")
    return Response(status_code=_NO_CONTENT)


# What an export is before anybody has worked on it.
_ANEW: Mapping[str, str] = {"state": ExportState.WAITING, "progress": "0", "num_starts": "0", "error": ""}


async def _own(parts: Parts, export: str, request: Request) -> Mapping[str, str]:
    return await own_record(parts, RecordKind.EXPORT, export, tenant=tenant_of(request), field="export")


def _view(export: str, record: Mapping[str, str]) -> Export:
    state = ExportState(record["state"])
    is_done = state is ExportState.DONE
    return Export(
        export_id=export,
        path=record["path"],
        format=record["format"],
        state=state,
        progress=float(record["progress"]),
        created_at=_time(record["created_ms"]),
        expires_at=_time(record["expires_ms"]),
        size_bytes=int(record["size_bytes"]) if is_done else None,
        directory=record["directory"] if is_done else None,
        error=record["error"] or None,
    )


def _time(ms: str) -> datetime:
    return datetime.fromtimestamp(int(ms) / 1000, tz=UTC)
