"""Inference endpoints: which servers would be given new weights. They are kept in the queue's records, so any API process knows them.

Only the machine's own tenant may name machines that this server then calls. Weights are not pushed to them yet.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from gradstream.api.auth import tenant_of
from gradstream.api.body import Body, documents, small_body
from gradstream.api.outbound import Outbound, Target, Unreachable, check_host
from gradstream.api.parts import Parts, parts_of
from gradstream.shared.errors import BudgetExceeded, Forbidden, Unsupported
from gradstream.shared.ids import LOCAL_TENANT
from gradstream.shared.joblog.port import RecordKind

router = APIRouter()
_RESOLVE_S = 5.0
_CHECK_S = 5.0
# Where inference servers say that they are well; one of them has to answer.
_HEALTH_PATHS = ("/health", "/v1/models")
_MAX_ENDPOINTS = 256
_MAX_TEXT = 512
_NO_PUSH = (
    "pushing weights to inference endpoints is not offered yet; save_weights_for_sampler writes them to a checkpoint, which an "
    "inference server can load from disk"
)
Port = Annotated[int, Field(ge=1, le=65535)]


class AddEndpointBody(Body):
    """The fields from sync_weights on say how weights would be pushed."""

    host: str
    port: Port
    worker_port: Port | None = None
    world_size: Annotated[int, Field(ge=1, le=4096)] = 1
    pool: Annotated[str, Field(min_length=1, max_length=128)] = "default"
    receiver_kv_cache_dtype: Annotated[str, Field(max_length=64)] | None = None
    sync_weights: bool = False
    master_address: Annotated[str, Field(max_length=253)] | None = None
    master_port: Annotated[int, Field(ge=0, le=65535)] = 29600
    group_name: Annotated[str, Field(max_length=128)] = "weight_sync_group"
    buffer_size_mb: Annotated[int, Field(ge=1)] = 1024
    model: str | None = None


class RemoveEndpointBody(Body):
    host: str
    port: Port
    model: str | None = None


class ServerInfo(BaseModel):
    """What an endpoint tells of itself at /server_info; null where it tells nothing."""

    model_config = ConfigDict(protected_namespaces=())

    model_path: str | None = None
    served_model_name: str | None = None
    tp_size: int | None = None
    enable_lora: bool | None = None
    max_lora_rank: int | None = None
    version: str | None = None


class Endpoint(BaseModel):
    """healthy: it answered when it was asked just now. detail: why not."""

    host: str
    port: int
    worker_port: int
    world_size: int
    pool: str
    healthy: bool
    server_info: ServerInfo | None = None
    detail: str | None = None


class EndpointAdded(BaseModel):
    success: bool
    message: str
    endpoint: Endpoint | None = None
    weights_synced: bool = False
    sync_message: str | None = None


class Endpoints(BaseModel):
    endpoints: list[Endpoint]
    count: int


class EndpointRemoved(BaseModel):
    success: bool
    message: str


@router.post("/add_inference_endpoint", openapi_extra=documents(AddEndpointBody))
async def add_inference_endpoint(request: Request) -> EndpointAdded:
    """Registers an inference server that answers; one that is registered takes the new settings. success says whether it did."""
    parts = _parts(request)
    body = await small_body(request, AddEndpointBody)
    host = check_host(body.host)
    await _check_room(parts)
    fields = {
        "tenant": LOCAL_TENANT,
        "host": host,
        "port": str(body.port),
        "worker_port": str(body.worker_port or body.port),
        "world_size": str(body.world_size),
        "pool": body.pool,
        "created_ms": str(parts.clock.wall_ms()),
    }
    endpoint = await _checked(parts.outbound, fields)
    if not endpoint.healthy:
        return EndpointAdded(success=False, message=f"{host}:{body.port} is not registered: {endpoint.detail}")
    await parts.intake.put_record(RecordKind.ENDPOINT, _name(host, body.port), fields)
    return EndpointAdded(
        success=True,
        message=f"{host}:{body.port} is registered",
        endpoint=endpoint,
        sync_message=_NO_PUSH if body.sync_weights else None,
    )


@router.get("/list_inference_endpoints")
async def list_inference_endpoints(request: Request) -> Endpoints:
    """Every registered inference server, each asked now whether it is well. One that is not stays registered."""
    parts = _parts(request)
    page = await parts.intake.list_tenant(RecordKind.ENDPOINT, LOCAL_TENANT, offset=0, limit=_MAX_ENDPOINTS)
    endpoints = await asyncio.gather(*(_checked(parts.outbound, record) for record in page.records.values()))
    return Endpoints(endpoints=list(endpoints), count=len(endpoints))


@router.post("/remove_inference_endpoint", openapi_extra=documents(RemoveEndpointBody))
async def remove_inference_endpoint(request: Request) -> EndpointRemoved:
    """Forgets an inference server; success is false when it was not registered."""
    parts = _parts(request)
    body = await small_body(request, RemoveEndpointBody)
    host = check_host(body.host)
    if await parts.intake.remove_record(RecordKind.ENDPOINT, _name(host, body.port)):
        return EndpointRemoved(success=True, message=f"{host}:{body.port} is not registered any more")
    return EndpointRemoved(success=False, message=f"{host}:{body.port} was not registered")


@router.post("/sync_inference_weights")
@router.post("/api/v1/sync_inference_weights")
@router.post("/api/v1/create_sampling_session")
async def push_weights() -> None:
    """Refused: neither full weights nor adapters are pushed to inference servers yet."""
    raise Unsupported(_NO_PUSH)


def _parts(request: Request) -> Parts:
    if tenant_of(request) != LOCAL_TENANT:
        raise Forbidden(
            f"inference endpoints: only keys of the tenant {LOCAL_TENANT!r} may name machines that this server calls"
        )
    return parts_of(request)


async def _check_room(parts: Parts) -> None:
    page = await parts.intake.list_tenant(RecordKind.ENDPOINT, LOCAL_TENANT, offset=0, limit=1)
    if page.total >= _MAX_ENDPOINTS:
        raise BudgetExceeded(f"{page.total} inference endpoints are registered, which is the most; remove some")


def _name(host: str, port: int) -> str:
    return f"{host}:{port}"


async def _checked(outbound: Outbound, record: Mapping[str, str]) -> Endpoint:
    """The endpoint of a record, with how it is now."""
    host, port = record["host"], int(record["port"])
    info, detail = None, None
    try:
        async with outbound.turn():
            target = await outbound.resolve(host, port, timeout_s=_RESOLVE_S)
            await _check_health(outbound, target)
            info = await _server_info(outbound, target)
    except Unreachable as error:
        detail = str(error)
    return Endpoint(
        host=host,
        port=port,
        worker_port=int(record["worker_port"]),
        world_size=int(record["world_size"]),
        pool=record["pool"],
        healthy=detail is None,
        server_info=info,
        detail=detail,
    )


async def _check_health(outbound: Outbound, target: Target) -> None:
    """Raise Unreachable unless one of the health paths is answered with success."""
    reasons = []
    for path in _HEALTH_PATHS:
        try:
            await outbound.get(target, path, timeout_s=_CHECK_S)
        except Unreachable as error:
            reasons.append(str(error))
        else:
            return
    raise Unreachable("; ".join(reasons))


async def _server_info(outbound: Outbound, target: Target) -> ServerInfo | None:
    """What the endpoint tells of itself, None when it has no /server_info. Of other fields than these nothing is taken over."""
    try:
        told = await outbound.get_object(target, "/server_info", timeout_s=_CHECK_S)
    except Unreachable:
        return None
    return ServerInfo(
        model_path=_text(told, "model_path"),
        served_model_name=_text(told, "served_model_name"),
        tp_size=_count(told, "tp_size"),
        enable_lora=value if isinstance(value := told.get("enable_lora"), bool) else None,
        max_lora_rank=_count(told, "max_lora_rank"),
        version=_text(told, "version"),
    )


def _text(told: Mapping[str, object], name: str) -> str | None:
    value = told.get(name)
    return value[:_MAX_TEXT] if isinstance(value, str) else None


def _count(told: Mapping[str, object], name: str) -> int | None:
    value = told.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
