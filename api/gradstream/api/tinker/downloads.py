"""Downloads: exporting weights, and plain GETs of a checkpoint's files by anybody who was given their unguessable URL."""

from collections.abc import Mapping
from datetime import datetime
from email.utils import format_datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pydantic import BaseModel, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import documents
from gradstream.api.budgets import check_storage_room
from gradstream.api.files import file_path, files_of, tar_size, tar_stream
from gradstream.api.links import linked_record, make_link
from gradstream.api.ordered import LANED, OrderedBody, ordered_body, refusing, submit_at
from gradstream.api.parts import Parts, parts_of
from gradstream.api.records import any_checkpoint_path, checkpoint_name, own_record
from gradstream.api.tinker.answers import Answer
from gradstream.api.tinker.weights import Ttl
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import SaveExternal

router = APIRouter()
_ONE = "/training_runs/{run_id}/checkpoints/{checkpoint_id:path}"
_ARCHIVE = "archive.tar"


class SaveExternalBody(OrderedBody):
    """path is the export's name; without it the name is made from seq_id."""

    path: str | None = None
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: Annotated[list[str], Field(max_length=64)] | None = None
    type: Literal["save_weights_external"] = "save_weights_external"


class ExternalUrls(BaseModel):
    urls: dict[str, str]
    expires: datetime


@router.post("/save_weights_external", openapi_extra=documents(SaveExternalBody) | LANED)
async def save_weights_external(request: Request) -> Answer:
    """Saves the adapter for download, in peft's format. The same (model_id, seq_id) with the same content is the same future."""
    parts = parts_of(request)
    body, place = await ordered_body(request, SaveExternalBody)
    async with refusing(parts, place):
        if body.age_encryption_recipients:
            raise Unsupported(
                "age_encryption_recipients: encryption of exports is not offered here; leave it out, and reach the server by TLS"
            )
        await check_storage_room(parts, place)
        name = place.checkpoint if body.path is None else checkpoint_name(body.path)
    return Answer(await submit_at(parts, place, SaveExternal(name=name, ttl_seconds=body.ttl_seconds)))


@router.get(f"{_ONE}/external_weights_urls")
async def external_weights_urls(run_id: str, checkpoint_id: str, request: Request) -> ExternalUrls:
    """A URL for each file of an export, for an hour. Who has a URL needs no key."""
    parts = parts_of(request)
    path, record = await _own(parts, run_id, checkpoint_id, tenant=tenant_of(request))
    if "/external_weights/" not in path:
        raise InvalidRequest(
            f"checkpoint_id: {checkpoint_id!r} is no export; save_weights_external makes one of the form external_weights/NAME"
        )
    files = files_of(record, output_dir=parts.config.output_dir)
    link = await make_link(parts, request, path, record, kind=RecordKind.CHECKPOINT)
    return ExternalUrls(urls={name: f"{link.base}/{name}" for name in files.sizes}, expires=link.expires)


@router.get(
    f"{_ONE}/archive", status_code=302, responses={302: {"description": "Location: a tar of the checkpoint's files"}}
)
async def archive(run_id: str, checkpoint_id: str, request: Request) -> Response:
    """Sends older clients to a tar of all files of the checkpoint; it is made while it is read, so there is nothing to wait for."""
    parts = parts_of(request)
    path, record = await _own(parts, run_id, checkpoint_id, tenant=tenant_of(request))
    files_of(record, output_dir=parts.config.output_dir)
    link = await make_link(parts, request, path, record, kind=RecordKind.CHECKPOINT)
    headers = {"Location": f"{link.base}/{_ARCHIVE}", "Expires": format_datetime(link.expires, usegmt=True)}
    return Response(status_code=302, headers=headers)


@router.get("/downloads/{token}/{name:path}", response_class=Response)
async def download(token: str, name: str, request: Request) -> Response:
    """One file of a checkpoint or export, or all of them as archive.tar. The token says of which; it needs no key. 404 when its time is over."""
    parts = parts_of(request)
    files = files_of(await linked_record(parts, token), output_dir=parts.config.output_dir)
    if name == _ARCHIVE:
        headers = {"Content-Length": str(tar_size(files)), "Content-Disposition": f'attachment; filename="{_ARCHIVE}"'}
        return StreamingResponse(tar_stream(files), media_type="application/x-tar", headers=headers)
    return FileResponse(file_path(files, name), media_type="application/octet-stream")


async def _own(parts: Parts, run_id: str, checkpoint_id: str, *, tenant: TenantId) -> tuple[str, Mapping[str, str]]:
    path = any_checkpoint_path(run_id, checkpoint_id)
    return path, await own_record(parts, RecordKind.CHECKPOINT, path, tenant=tenant, field="checkpoint_id")
