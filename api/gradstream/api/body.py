"""Request bodies: read under a cap, unpacked, and turned into small pydantic bodies or handed on as bytes."""

import asyncio
import os
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from gradstream.api.arrival import arrived_s
from gradstream.api.auth import tenant_of
from gradstream.api.headers import header
from gradstream.api.limits import Lease
from gradstream.api.parts import Parts
from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge

T = TypeVar("T")
B = TypeVar("B", bound="Body")

# Parsing less than this on the event loop costs under a millisecond; more goes to a thread.
OFFLOAD_ABOVE_BYTES = 64 * 1024
MAX_SMALL_BODY_BYTES = 256 * 1024
# How much later the kernel serves a thread that works on bodies, in steps of niceness.
_NICER = 4


def _step_back() -> None:
    """Let the event loop's thread go first where both want a core. Only Linux gives each thread a niceness of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + _NICER)


# Few threads: more of them would only take the interpreter and the cores from the event loop, on which everything small waits. The largest
# bodies have one of their own, so that none of them keeps all others.
_LARGE = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2), thread_name_prefix="body", initializer=_step_back)
_HUGE = ThreadPoolExecutor(1, thread_name_prefix="huge-body", initializer=_step_back)
_HUGE_ABOVE_BYTES = 16 * 1024 * 1024
# Where the choice of the dialect leaves a body that it read, or what went wrong while it was read.
SCOPE_BODY = "gradstream.body"
PROTOBUF = "application/x-protobuf"
# What some writers of JSON put in the place of numbers, although JSON has no such thing.
NO_NUMBER = re.compile(rb"\b(?:NaN|Infinity)\b")


class Body(BaseModel):
    """A small JSON body: unknown fields are refused, types are exact, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


def raw_body(request: Request, parts: Parts, *, max_bytes: int) -> AbstractAsyncContextManager[bytes]:
    """The body's bytes, unpacked, counted against the server's budget while they are held.

    A large body whose length is declared is not read before there is room for all of it; it waits in the client's hands, until admit_hold_s
    after the arrival of the request.
    Entering raises PayloadTooLarge above max_bytes (before buffering where the length is declared), InvalidRequest for an encoding that is
    broken or not known, QueueFull when other bodies fill the memory.
    """
    return _HeldBody(request, parts, max_bytes=max_bytes)


class _HeldBody(AbstractAsyncContextManager[bytes]):
    """See raw_body. Written out: a generator in its place takes longer than reading a small body."""

    def __init__(self, request: Request, parts: Parts, *, max_bytes: int) -> None:
        self._request = request
        self._parts = parts
        self._max_bytes = max_bytes
        self._lease: Lease | None = None

    async def __aenter__(self) -> bytes:
        if SCOPE_BODY in self._request.scope:
            return _read_before(self._request)
        declared = _check_declared_length(self._request, self._max_bytes)
        lease = self._lease = self._parts.bodies.lease(tenant_of(self._request))
        try:
            raw = await _received(self._request, self._parts, lease, declared=declared, max_bytes=self._max_bytes)
            return await _unpacked(self._request, raw, lease, max_bytes=self._max_bytes)
        except BaseException:
            await self.__aexit__()
            raise

    async def __aexit__(self, *_error: object) -> None:
        if self._lease is not None:
            self._lease.end()


async def _received(request: Request, parts: Parts, lease: Lease, *, declared: int, max_bytes: int) -> bytes:
    """The body as it came, held by the lease."""
    received: list[bytes] = []
    num_bytes = 0

    def take(part: bytes) -> None:
        nonlocal num_bytes
        num_bytes += len(part)
        if num_bytes > max_bytes:
            raise PayloadTooLarge(f"body: more than {max_bytes} bytes, the limit of this call")
        lease.take(max(0, num_bytes - lease.held_bytes))
        received.append(part)

    if declared > OFFLOAD_ABOVE_BYTES:
        deadline_s = arrived_s(parts.clock) + parts.config.admit_hold_s
        await lease.wait(declared, timeout_s=max(0.0, deadline_s - parts.clock.monotonic_s()))
        async with aclosing(parts.receiving.parts(request.stream())) as stream:
            async for part in stream:
                take(part)
    else:
        await _each_part(request, take)
    parts.metrics.body_bytes.inc(num_bytes)
    return received[0] if len(received) == 1 else b"".join(received)


async def _each_part(request: Request, take: Callable[[bytes], object]) -> None:
    """Hand over the parts of a body as they come; without the generator of Request.stream, which takes longer than a small body.

    Raises ClientDisconnect.
    """
    has_more = True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        if part := message.get("body"):
            take(part)
        has_more = message.get("more_body", False)


async def _unpacked(request: Request, raw: bytes, lease: Lease, *, max_bytes: int) -> bytes:
    """The content of a body; what unpacking adds is held by the lease too."""
    encoding = header(request.scope, b"content-encoding") or ""
    match encoding.strip().lower():
        case "" | "identity":
            return raw
        case "zstd":
            # A frame that does not say what comes out of it may take long.
            size_bytes = min(codec.declared_size(raw) or OFFLOAD_ABOVE_BYTES + 1, max_bytes)
            content = await offloaded(lambda: codec.decompress(raw, max_bytes=max_bytes), size_bytes=size_bytes)
            lease.take(len(content))
            return content
        case _:
            raise InvalidRequest(f"content-encoding: {encoding!r} is not read here; send zstd or no encoding")


async def offloaded(work: Callable[[], T], *, size_bytes: int) -> T:
    """The result of work, run in a thread when it handles enough bytes to be felt by other requests."""
    if size_bytes <= OFFLOAD_ABOVE_BYTES:
        return work()
    threads = _HUGE if size_bytes > _HUGE_ABOVE_BYTES else _LARGE
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def is_protobuf(scope: Scope) -> bool:
    """True when the request's body is declared as protobuf."""
    declared = header(scope, b"content-type")
    return declared is not None and declared.split(";")[0].strip().lower() == PROTOBUF


async def small_bytes(request: Request) -> bytes:
    """The bytes of a small body."""
    if SCOPE_BODY in request.scope:
        return _read_before(request)
    _check_declared_length(request, MAX_SMALL_BODY_BYTES)
    received = bytearray()

    def take(part: bytes) -> None:
        received.extend(part)
        if len(received) > MAX_SMALL_BODY_BYTES:
            raise PayloadTooLarge(f"body: more than {MAX_SMALL_BODY_BYTES} bytes, the limit of this call")

    await _each_part(request, take)
    return bytes(received)


async def small_body(request: Request, model: type[B]) -> B:
    """A small JSON body of the given model; raises InvalidRequest that names every wrong field."""
    return parse_small(await small_bytes(request), model)


def parse_small(raw: bytes, model: type[B]) -> B:
    """raw as the given model; raises InvalidRequest that names every wrong field."""
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise InvalidRequest(sentence(error)) from error


def typed(decoder: msgspec.json.Decoder[T], raw: bytes) -> T:
    """The decoder's value of raw, its errors as InvalidRequest."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"body: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        hint = "; JSON has no NaN and no Infinity, send finite numbers" if NO_NUMBER.search(raw) is not None else ""
        raise InvalidRequest(f"body: not valid JSON ({error}){hint}") from error


def sentence(error: ValidationError) -> str:
    """What is wrong with which fields, in one line."""
    parts = []
    for item in error.errors(include_url=False, include_context=False, include_input=False)[:8]:
        where = ".".join(str(step) for step in item["loc"]) or "body"
        parts.append(f"{where}: {item['msg']}")
    return "; ".join(parts)


def _read_before(request: Request) -> bytes:
    """The body that the choice of the dialect read; raises what went wrong then."""
    body = request.scope[SCOPE_BODY]
    if isinstance(body, Exception):
        raise body
    assert isinstance(body, bytes)
    return body


def _check_declared_length(request: Request, max_bytes: int) -> int:
    """The length that the client declares, 0 for none. Raises PayloadTooLarge."""
    declared = header(request.scope, b"content-length")
    if declared is None or not declared.isdecimal():
        return 0
    if int(declared) > max_bytes:
        raise PayloadTooLarge(f"body: {declared} bytes are more than {max_bytes}, the limit of this call")
    return int(declared)


# Any: an OpenAPI fragment is free-form JSON.
def documents(*models: type[BaseModel], protobuf: str | None = None) -> dict[str, Any]:
    """The OpenAPI request body of a handler that reads its body itself."""
    content: dict[str, Any] = {}
    if models:
        schemas = [_inlined(model.model_json_schema()) for model in models]
        content["application/json"] = {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}
    if protobuf is not None:
        content[PROTOBUF] = {"schema": {"type": "string", "format": "binary", "description": protobuf}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its own $defs put in place of the references to them; our bodies never recurse."""
    definitions = schema.get("$defs", {})

    def resolve(node: object) -> object:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[str(node["$ref"]).rsplit("/", 1)[-1]])
        return {key: resolve(value) for key, value in node.items() if key != "$defs"}

    resolved = resolve(schema)
    assert isinstance(resolved, dict)
    return resolved
