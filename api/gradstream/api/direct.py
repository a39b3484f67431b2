"""Routes that ask nothing of FastAPI but the request: called without it.

FastAPI finds a route by trying one after the other, solves its dependencies and opens scopes for them. A handler that takes a request and
gives a response has none of that to wait for, and the calls that come all the time are such handlers. They are declared as ever, so the
documentation has them.
"""

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, get_type_hints

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

# Method and path.
Call = tuple[str, str]
# Any: FastAPI's handlers take the class that they are registered for.
ErrorHandler = Callable[[Request, Any], Awaitable[Response]]


def direct_routes(routers: Sequence[APIRouter], *, prefix: str = "") -> Iterator[tuple[Call, APIRoute]]:
    """The routes that can be called directly, by method and public path."""
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute) and _is_direct(route):
                for method in route.methods or ():
                    yield (method, prefix + route.path), route


def _is_direct(route: APIRoute) -> bool:
    """True when the path has no parameters, and the handler takes the request alone and gives a response."""
    if "{" in route.path or route.dependencies or not inspect.iscoroutinefunction(route.endpoint):
        return False
    hints = get_type_hints(route.endpoint)
    given = hints.pop("return", None)
    return list(hints.values()) == [Request] and inspect.isclass(given) and issubclass(given, Response)


class Direct:
    """ASGI app: calls the routes it knows, and app for everything else. handlers: answers to errors of a route, by their class."""

    def __init__(
        self, app: ASGIApp, *, routes: Mapping[Call, APIRoute], handlers: Mapping[type[Exception], ErrorHandler]
    ) -> None:
        self._app = app
        self._routes = routes
        self._handlers = handlers
        self._handled = tuple(handlers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        request = Request(scope, receive)
        try:
            response: Response = await route.endpoint(request)
        except self._handled as error:
            handler = next(self._handlers[kind] for kind in type(error).__mro__ if kind in self._handlers)
            response = await handler(request, error)
        # Its body need not be in memory until the client has read the answer.
        del request
        await response(scope, receive, send)
