"""What a client asks before it does anything: configuration, capabilities, health; and where its telemetry goes."""

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict

from gradstream.api.body import Body, documents, offloaded, raw_body, small_body, typed
from gradstream.api.parts import parts_of
from gradstream.shared.errors import Unavailable

router = APIRouter()
# What the SDK puts into one request unless told otherwise.
_CHUNK_DATUMS = 1024
_MAX_TELEMETRY_BYTES = 8 * 1024 * 1024


class ClientConfigBody(Body):
    sdk_version: str | None = None


class ClientConfig(BaseModel):
    """The SDK's flags that this server sets; the rest keep the SDK's defaults. docs/client-flags.md says why each has its value."""

    pjwt_auth_enabled: bool = False
    credential_default_source: str = "api_key"
    parallel_fwdbwd_chunks: bool = True
    proto_compress_fwdbwd: bool = True
    proto_write_fwdbwd: bool = True
    fwdbwd_max_chunk_len: int
    fwdbwd_max_chunk_bytes_count: int = 5_000_000
    sample_use_retrieve_futures: bool = True
    custom_loss_server_side: bool = False
    sample_join_sampling_session: bool = True
    use_pyqwest_transport: bool


class ClientDynamicConfig(BaseModel):
    refresh_interval_sec: int = 300
    sample_cancel_enabled: bool = True
    sample_cancel_max_batch_size: int = 64


class SupportedModel(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    max_context_length: int
    trainable: bool = True
    sampleable: bool = True


class Capabilities(BaseModel):
    supported_models: list[SupportedModel]


class Health(BaseModel):
    status: str


class TelemetryAccepted(BaseModel):
    status: str = "accepted"


class _Telemetry(msgspec.Struct):
    """Only the number of events is read."""

    events: list[msgspec.Raw]


_TELEMETRY = msgspec.json.Decoder(_Telemetry)


@router.post("/client/config", openapi_extra=documents(ClientConfigBody))
async def client_config(request: Request) -> ClientConfig:
    """Flags for the SDK. A 404 here is fatal for it."""
    await small_body(request, ClientConfigBody)
    max_datums = parts_of(request).config.max_datums
    return ClientConfig(
        fwdbwd_max_chunk_len=min(_CHUNK_DATUMS, max_datums),
        use_pyqwest_transport=not _loses_cancellations(request.headers.get("x-stainless-runtime-version", "")),
    )


def _loses_cancellations(python_version: str) -> bool:
    """True for a Python before 3.12, whose asyncio.wait_for drops a cancellation that comes together with a result.

    The SDK's pyqwest transport awaits every answer there, so closing a client could wait for ever for a poller that missed its end.
    """
    major, _, rest = python_version.partition(".")
    return major == "3" and (minor := rest.partition(".")[0]).isdecimal() and int(minor) < 12


@router.post("/client/dynamic_config", openapi_extra=documents(ClientConfigBody))
async def client_dynamic_config(request: Request) -> ClientDynamicConfig:
    """Flags that the SDK asks for again from time to time."""
    await small_body(request, ClientConfigBody)
    return ClientDynamicConfig()


@router.get("/healthz", responses={503: {"description": "starting: no worker is ready"}})
async def healthz(request: Request, response: Response) -> Health:
    """ok while the API, Redis and a worker are there; 503 otherwise."""
    parts = parts_of(request)
    try:
        await parts.catalog.card()
        is_alive = await parts.intake.is_worker_alive()
    except Unavailable:
        is_alive = False
    if is_alive:
        return Health(status="ok")
    response.status_code = 503
    response.headers["Retry-After"] = "2"
    return Health(status="starting")


@router.get("/get_server_capabilities")
async def get_server_capabilities(request: Request) -> Capabilities:
    """The base models by every name that clients may use; 503 before the first worker was ready."""
    card = await parts_of(request).catalog.card()
    return Capabilities(
        supported_models=[
            SupportedModel(model_name=name, max_context_length=card.max_context_tokens) for name in card.names()
        ]
    )


@router.post("/telemetry")
async def telemetry(request: Request) -> TelemetryAccepted:
    """Counts the events and drops them: they may hold tracebacks and prompts, which are never kept."""
    parts = parts_of(request)
    async with raw_body(request, parts, max_bytes=_MAX_TELEMETRY_BYTES) as raw:
        parsed = await offloaded(lambda: typed(_TELEMETRY, raw), size_bytes=len(raw))
    parts.metrics.telemetry_events.inc(len(parsed.events))
    return TelemetryAccepted()
