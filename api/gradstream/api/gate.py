"""The gate in front of every route: it finds the tenant of a request, or turns it away before its body is read."""

import math

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gradstream.api.arrival import note_arrival
from gradstream.api.auth import SCOPE_TENANT, credential, is_from_foreign_page
from gradstream.api.errors import http_error
from gradstream.api.failures import FailureLimit
from gradstream.api.parts import Parts
from gradstream.shared.ids import LOCAL_TENANT, TenantId

# Answers that say nothing of any tenant: health for probes, and the documentation. A path is public only when it is named here.
PUBLIC = frozenset(
    {"/api/v1/healthz", "/health", "/xorl/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
# Public paths that tell more to those who have a key: there too a key can be guessed.
_TELLS_MORE_WITH_KEY = frozenset({"/health", "/xorl/health"})
# Below this, the path itself holds a secret that was given to a tenant.
DOWNLOADS = "/api/v1/downloads/"
_LOG = structlog.get_logger("gradstream.api")
_NO_KEY = "no API key: send it as X-API-Key, or as Authorization: Bearer; `gradstream keys add` makes one"
_WRONG_KEY = "this API key is not known here: it may be mistyped or revoked; `gradstream keys add` makes another"


class Gate:
    """ASGI middleware. With a key file, a request needs one of its keys; without one, it must come from this machine's own programs."""

    def __init__(self, app: ASGIApp, *, parts: Parts) -> None:
        self._app = app
        self._parts = parts
        self._failures = FailureLimit(clock=parts.clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note_arrival(self._parts.clock)
        admitted = self._admit(scope)
        if isinstance(admitted, Response):
            await admitted(scope, receive, send)
            return
        if admitted is not None:
            scope[SCOPE_TENANT] = admitted
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> TenantId | Response | None:
        """The tenant, None for a public path, or the refusal."""
        if self._parts.keys is None:
            return self._admit_without_keys(scope)
        key = credential(scope)
        tenant = None if key is None else self._parts.keys.ring().tenant_of(key)
        if scope["path"] in _TELLS_MORE_WITH_KEY and key is not None and tenant is None:
            return self._limited(scope, reason="wrong_key")
        if scope["path"] in PUBLIC or scope["path"].startswith(DOWNLOADS):
            return None
        return self._refuse(scope, has_key=key is not None) if tenant is None else tenant

    def _admit_without_keys(self, scope: Scope) -> TenantId | Response:
        if self._parts.config.is_open or not is_from_foreign_page(scope):
            return LOCAL_TENANT
        detail = (
            "this server has no API keys and so answers this machine's own programs only, under the names localhost and 127.0.0.1; "
            "for other names, or for web pages, give it keys"
        )
        return http_error(403, code="forbidden", detail=detail)

    def _refuse(self, scope: Scope, *, has_key: bool) -> Response:
        reason = "wrong_key" if has_key else "no_key"
        if (limited := self._limited(scope, reason=reason)) is not None:
            return limited
        refusal = http_error(401, code="unauthorized", detail=_WRONG_KEY if has_key else _NO_KEY)
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal

    def _limited(self, scope: Scope, *, reason: str) -> Response | None:
        """Count a failure; the refusal when its address has had too many."""
        address = scope["client"][0] if scope.get("client") else "unknown"
        if self._failures.is_over(address):
            self._parts.metrics.auth_failures.labels(reason="limited").inc()
            refusal = http_error(
                429, code="too_many_failures", detail="too many requests without a valid API key; wait a little"
            )
            refusal.headers["Retry-After"] = str(math.ceil(self._failures.refill_s))
            return refusal
        self._parts.metrics.auth_failures.labels(reason=reason).inc()
        _LOG.warning("auth_failed", reason=reason, address=address)
        return None
