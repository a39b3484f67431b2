"""Who is asking: from a request to its tenant."""

from functools import lru_cache
from urllib.parse import urlsplit

from fastapi import Request
from starlette.types import Scope

from gradstream.api.headers import header
from gradstream.shared.config.access import is_loopback
from gradstream.shared.ids import TenantId

# Where the gate leaves the tenant for the handlers.
SCOPE_TENANT = "gradstream.tenant"
_BEARER = "bearer "
# Longer texts are no keys, and are not looked at.
_MAX_CREDENTIAL_CHARS = 512


def tenant_of(request: Request) -> TenantId:
    """The tenant of a request, as the gate found it. Every handler but the public ones runs behind the gate."""
    tenant = request.scope[SCOPE_TENANT]
    assert isinstance(tenant, str)
    return TenantId(tenant)


def credential(scope: Scope) -> str | None:
    """The key of a request: X-API-Key, else Authorization: Bearer; None when there is neither."""
    key = header(scope, b"x-api-key")
    if key is None:
        authorization = header(scope, b"authorization") or ""
        if authorization[: len(_BEARER)].lower() != _BEARER:
            return None
        key = authorization[len(_BEARER) :].strip()
    return key if key and len(key) <= _MAX_CREDENTIAL_CHARS else None


def is_from_foreign_page(scope: Scope) -> bool:
    """True for a request that a page of some web site may have made in a browser on this machine.

    Without keys, being on this machine is what lets a client in, so a browser must not lend that to others: neither by a request
    across origins nor by a name that a stranger's DNS points at this machine.
    """
    origin = header(scope, b"origin")
    if origin is not None and not _is_of_this_machine(origin):
        return True
    host = header(scope, b"host")
    return host is not None and not _is_of_this_machine(f"//{host}")


@lru_cache(maxsize=256)
def _is_of_this_machine(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False
