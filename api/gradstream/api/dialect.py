"""Two dialects at the same addresses: which of them a request speaks, decided from its body, which is read once.

How it works:
- The tinker routes lie at /api/v1/... as ever. The xorl routes are ordinary FastAPI routes that are declared with their whole public
  path ("/api/v1/forward_backward", "/sleep"), and are mounted below /xorl. A client may use that prefix as its base URL and then speaks
  xorl in any case. Modules of `api/xorl/routes.py`'s RESOURCES are found by themselves: nothing here has to be edited for a new route.
- `Dialects`, the innermost middleware, sends every other request to where it belongs by changing its path: a path that only xorl has
  goes below /xorl; one that only tinker has stays; on a POST path that both have, the body decides by the path's rule in RULES, else by
  `speaks_xorl`. GET paths that both have stay with tinker, as there is nothing to tell them apart.
- The body of such a POST is read here, under the same cap and the same budget as ever, and is left in the scope, where `raw_body` and
  `small_bytes` find it. What goes wrong while it is read is left there too and is raised by the handler that asks for the body.
- Protobuf and bodies that are no JSON object are tinker's, whose handlers say what is wrong with them.

A rule sees the body's top-level fields and says True for xorl. A path that needs more than `speaks_xorl` gets a line in RULES.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack

import msgspec
from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from gradstream.api.access import API_PREFIX
from gradstream.api.body import NO_NUMBER, SCOPE_BODY, is_protobuf, offloaded, raw_body, small_bytes
from gradstream.api.parts import Parts
from gradstream.shared.errors import GradstreamError

XORL_PREFIX = "/xorl"
# Paths whose bodies hold training data; every other body is small.
_LARGE = frozenset({f"{API_PREFIX}/forward_backward", f"{API_PREFIX}/forward"})
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_-]{0,127}")
# Ids of sessions that create_session made for a tinker client.
_UUID = re.compile(r"[0-9a-f-]{36}")
# A future is {model}:{seq}. Models of xorl clients are NAME or TENANT:NAME, those of tinker SESSION:train:N.
_MAX_XORL_COLONS = 2


def is_name(text: str) -> bool:
    """True for what a xorl client may call a model; no id of the tinker dialect is one, as those have colons."""
    return _NAME.fullmatch(text) is not None


class Fields:
    """The top-level fields of a JSON body. A value is decoded only when it is asked for."""

    def __init__(self, raw: Mapping[str, msgspec.Raw]) -> None:
        self._raw = raw

    def __contains__(self, name: str) -> bool:
        return name in self._raw

    def text(self, name: str) -> str | None:
        """The field's value when it is a string, else None."""
        if name not in self._raw:
            return None
        value = msgspec.json.decode(self._raw[name])
        return value if isinstance(value, str) else None


Rule = Callable[[Fields], bool]


def speaks_xorl(fields: Fields) -> bool:
    """The common rule: a model that has a xorl client's name, or none at all, which is the model `default`."""
    name = "model_id" if "model_id" in fields else "session_id"
    text = fields.text(name)
    return name not in fields if text is None else is_name(text)


def _new_model(fields: Fields) -> bool:
    """A tinker client makes its session's nth model; a xorl client names the model."""
    return "model_seq_id" not in fields


def _load(fields: Fields) -> bool:
    return "model_seq_id" not in fields and speaks_xorl(fields)


def _future(fields: Fields) -> bool:
    text = fields.text("request_id")
    return text is not None and 1 <= text.count(":") <= _MAX_XORL_COLONS


def _weights_info(fields: Fields) -> bool:
    return "tinker_path" not in fields


def _heartbeat(fields: Fields) -> bool:
    session = fields.text("session_id" if "session_id" in fields else "model_id")
    return session is not None and is_name(session) and _UUID.fullmatch(session) is None


def _new_session(fields: Fields) -> bool:
    return any(name in fields for name in ("session_id", "model_id", "base_model", "lora_config"))


def _new_sampling_session(fields: Fields) -> bool:
    return "sampling_session_seq_id" not in fields and "session_id" not in fields


# By path below API_PREFIX.
RULES: Mapping[str, Rule] = {
    "/create_model": _new_model,
    "/load_weights": _load,
    "/retrieve_future": _future,
    "/weights_info": _weights_info,
    "/session_heartbeat": _heartbeat,
    "/create_session": _new_session,
    "/create_sampling_session": _new_sampling_session,
}

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def decides_for_xorl(path: str, body: bytes) -> bool:
    """True when the body of a POST to a path that both dialects have speaks xorl."""
    try:
        return RULES.get(path.removeprefix(API_PREFIX), speaks_xorl)(_fields(body))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def _fields(body: bytes) -> Fields:
    """The body's fields, also where NaN or Infinity are among its numbers: who sent them should hear of just that."""
    try:
        return Fields(_FIELDS.decode(body))
    except msgspec.DecodeError:
        return Fields(_FIELDS.decode(NO_NUMBER.sub(b"0", body)))


def paths_of(routers: Sequence[APIRouter], *, prefix: str = "") -> frozenset[tuple[str, str]]:
    """Method and path of every route."""
    return frozenset(
        (method, prefix + route.path)
        for router in routers
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    )


class Dialects:
    """ASGI middleware: see the module. tinker and xorl: method and public path of every route of each."""

    def __init__(
        self, app: ASGIApp, *, parts: Parts, tinker: frozenset[tuple[str, str]], xorl: frozenset[tuple[str, str]]
    ) -> None:
        self._app = app
        self._parts = parts
        self._shared = tinker & xorl
        self._xorl_only = xorl - tinker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = (scope["method"], scope["path"])
        if call in self._xorl_only:
            _redirect(scope)
        if call not in self._shared or scope["method"] != "POST" or is_protobuf(scope):
            await self._app(scope, receive, send)
        elif scope["path"] in _LARGE:
            await self._choose_large(Request(scope, receive), send)
        else:
            request = Request(scope, receive)
            await self._choose(request, small_bytes(request))
            # Long polls come this way, by the thousand: nothing is kept while they wait.
            del request
            await self._app(scope, receive, send)

    async def _choose_large(self, request: Request, send: Send) -> None:
        """Answer a request whose body counts against the budget for as long as that takes."""
        async with AsyncExitStack() as stack:
            max_bytes = self._parts.config.max_json_body_bytes
            body = stack.enter_async_context(raw_body(request, self._parts, max_bytes=max_bytes))
            await self._choose(request, body)
            await self._app(request.scope, request.receive, send)

    async def _choose(self, request: Request, reading: Awaitable[bytes]) -> None:
        """Read the body, leave it in the scope, and change the path of a request that speaks xorl."""
        scope, path = request.scope, request.scope["path"]
        try:
            body = await reading
        except (GradstreamError, ClientDisconnect) as error:
            scope[SCOPE_BODY] = error
            return
        scope[SCOPE_BODY] = body
        if await offloaded(lambda: decides_for_xorl(path, body), size_bytes=len(body)):
            _redirect(scope)


def _redirect(scope: Scope) -> None:
    scope["path"] = XORL_PREFIX + scope["path"]
    scope["raw_path"] = scope["path"].encode()
