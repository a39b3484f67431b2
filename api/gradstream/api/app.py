"""create_app: routers, error handlers and the gap check around the parts."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from gradstream.api import access
from gradstream.api.auth import tenant_of
from gradstream.api.dialect import XORL_PREFIX, Dialects, paths_of
from gradstream.api.direct import Direct, ErrorHandler, direct_routes
from gradstream.api.errors import http_error, response_of
from gradstream.api.gate import Gate
from gradstream.api.native.routes import RESOURCES as OWN
from gradstream.api.parts import Parts, parts_of
from gradstream.api.tinker.routes import RESOURCES
from gradstream.api.xorl.routes import RESOURCES as XORL
from gradstream.shared.errors import GradstreamError, Unavailable
from gradstream.shared.ids import LOCAL_TENANT

_LOG = structlog.get_logger("gradstream.api")
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(parts: Parts) -> FastAPI:
    """The ASGI app. The intake of parts must be open while it serves; the app never closes it."""
    app = _App(title="gradstream", summary="A training server for language models.", lifespan=_lifespan)
    app.state.parts = parts
    for resource in (*RESOURCES, *OWN):
        app.include_router(resource.router, prefix=access.API_PREFIX, tags=[resource.__name__.rsplit(".", 1)[-1]])
    for resource in XORL:
        app.include_router(resource.router, prefix=XORL_PREFIX, tags=[f"xorl {resource.__name__.rsplit('.', 1)[-1]}"])
    app.add_api_route("/metrics", _metrics, methods=["GET"], include_in_schema=False)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


class _App(FastAPI):
    """FastAPI behind what every request passes. The access log answers for bugs and sees refusals too; no body is read before the gate."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Past what FastAPI does here for traces and for apps below a path, which are not used."""
        await Starlette.__call__(self, scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        """In place of FastAPI's own stack, which has layers for traces, limits of bodies and bugs that are not used here."""
        parts = self.state.parts
        ours, xorl = [resource.router for resource in (*RESOURCES, *OWN)], [resource.router for resource in XORL]
        routes = (*direct_routes(ours, prefix=access.API_PREFIX), *direct_routes(xorl, prefix=XORL_PREFIX))
        app: ASGIApp = ExceptionMiddleware(AsyncExitStackMiddleware(self.router), handlers=self.exception_handlers)
        app = Direct(app, routes=dict(routes), handlers=_HANDLERS)
        app = Dialects(app, parts=parts, tinker=paths_of(ours, prefix=access.API_PREFIX), xorl=paths_of(xorl))
        return access.AccessLog(Gate(app, parts=parts), clock=parts.clock, metrics=parts.metrics)


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    parts = app.state.parts
    await _look(parts)
    async with asyncio.TaskGroup() as tasks:
        check = tasks.create_task(_check_gaps(parts))
        yield
        check.cancel()
        await parts.outbound.close()


async def _check_gaps(parts: Parts) -> None:
    """Fail, now and then, the jobs that wait for a seq_id that does not come. Safe in every replica at once."""
    while True:
        await asyncio.sleep(parts.config.gap_check_s)
        await _look(parts)
        try:
            num_failed = await parts.intake.fail_gaps()
        except GradstreamError as error:
            _LOG.warning("gap_check_failed", code=error.code, detail=error.message)
            continue
        # The guard of a background task: without it one odd answer of Redis ends the checks, and held jobs wait for ever.
        except Exception:  # noqa: BLE001
            _LOG.exception("gap_check_failed")
            continue
        if num_failed:
            parts.metrics.gaps_failed.inc(num_failed)
            _LOG.warning("gap_jobs_failed", num_jobs=num_failed)


async def _look(parts: Parts) -> None:
    """See who leads, so that the first request for something that does not exist hears so at once."""
    try:
        await parts.recovery.look()
    except GradstreamError as error:
        _LOG.debug("leader_not_seen", code=error.code, detail=error.message)


async def _metrics(request: Request) -> Response:
    """The counts are of all tenants together, so with keys they are for the machine's own tenant only."""
    if tenant_of(request) != LOCAL_TENANT:
        return http_error(
            403, code="forbidden", detail=f"metrics: only keys of the tenant {LOCAL_TENANT!r} may read them"
        )
    return Response(generate_latest(parts_of(request).metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _on_gradstream_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GradstreamError)
    try:
        await parts_of(request).recovery.check(error, since_s=request.scope[access.SCOPE_START])
    except Unavailable as instead:
        return response_of(instead)
    return response_of(error)


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{error.detail}; the calls of this server are listed at /docs"
    return http_error(error.status_code, code=_CODES.get(error.status_code, "user_error"), detail=detail)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody reads this answer; it only ends the request."""
    return http_error(400, code="invalid_request", detail="body: the client closed the connection while sending it")


_HANDLERS: Mapping[type[Exception], ErrorHandler] = {
    GradstreamError: _on_gradstream_error,
    HTTPException: _on_http_exception,
    ClientDisconnect: _on_disconnect,
}
