"""One log line and one count per request, around everything else."""

from dataclasses import dataclass

import structlog
from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gradstream.api.errors import http_error
from gradstream.api.metrics import Metrics
from gradstream.shared.clock import Clock

API_PREFIX = "/api/v1"
# In the scope of a request: when it came, by the monotonic clock.
SCOPE_START = "gradstream.start_s"
_LOG = structlog.get_logger("gradstream.api")
# Polls and heartbeats come all the time and say little.
_QUIET = (
    "/retrieve_future",
    "/retrieve_futures",
    "/session_heartbeat",
    "/telemetry",
    "/healthz",
    "/health",
    "/metrics",
)
# Of a job that was accepted the worker's log speaks.
_QUIET_WHEN_ACCEPTED = ("/forward_backward", "/forward", "/optim_step", "/asample")


class AccessLog:
    """ASGI middleware. A bug in a handler is logged with its traceback and answered with a plain 500."""

    def __init__(self, app: ASGIApp, *, clock: Clock, metrics: Metrics) -> None:
        self._app = app
        self._clock = clock
        self._metrics = metrics
        # Looking a metric up by its labels takes longer than counting; as bounded as the labels are.
        self._kinds: dict[tuple[str, str, int], _Kind] = {}
        self._log = _LOG.bind()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s = self._clock.monotonic_s()
        scope[SCOPE_START] = start_s
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                self._record(scope, status, elapsed_s=self._clock.monotonic_s() - start_s)

        try:
            await self._app(scope, receive, watched)
        # The HTTP boundary: whatever a handler did not foresee must not end the connection without an answer.
        except Exception:
            _LOG.exception("http_handler_failed", method=scope["method"], route=_route(scope))
            if status:
                raise
            answer = http_error(
                500, code="server_error", detail="the server failed on this request; its log has the details"
            )
            await answer(scope, receive, watched)

    def _record(self, scope: Scope, status: int, *, elapsed_s: float) -> None:
        method, route = scope["method"], _route(scope)
        kind = self._kinds.get((method, route, status)) or self._kind(method, route, status)
        kind.requests.inc()
        kind.seconds.observe(elapsed_s)
        log = self._log.debug if kind.is_quiet else self._log.info
        log("http_request", method=method, route=route, status=status, elapsed_ms=round(elapsed_s * 1000, 3))

    def _kind(self, method: str, route: str, status: int) -> "_Kind":
        """What such requests have in common, kept for the next one."""
        kind = self._kinds[method, route, status] = _Kind(
            requests=self._metrics.requests.labels(method=method, route=route, status=str(status)),
            seconds=self._metrics.request_seconds.labels(route=route),
            is_quiet=(status < 500 and route.endswith(_QUIET))
            or (status < 400 and route.endswith(_QUIET_WHEN_ACCEPTED)),
        )
        return kind


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Requests of one method, route and status. seconds: of the route, whatever the status."""

    requests: Counter
    seconds: Histogram
    is_quiet: bool


def _route(scope: Scope) -> str:
    """The route's template, so that labels stay bounded; `other` for paths that there are not."""
    path = getattr(scope.get("route"), "path", None)
    if not isinstance(path, str):
        return "other"
    # A route of an included router knows its path without the router's prefix.
    is_bare = scope["path"].startswith(API_PREFIX) and not path.startswith(API_PREFIX)
    return f"{API_PREFIX}{path}" if is_bare else path
