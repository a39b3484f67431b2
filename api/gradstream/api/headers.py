"""A request's headers. Starlette's mapping goes through all of them, and decodes each, for every look."""

from collections.abc import Mapping

from starlette.types import Scope

# In the scope of a request: the first header of each name.
_SCOPE_HEADERS = "gradstream.headers"


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that name, given in lower case."""
    first: Mapping[bytes, bytes] | None = scope.get(_SCOPE_HEADERS)
    if first is None:
        first = scope[_SCOPE_HEADERS] = dict(reversed(scope["headers"]))
    value = first.get(name)
    return None if value is None else value.decode("latin-1")


def headers(scope: Scope, name: bytes) -> list[str]:
    """All headers of that name, given in lower case, in their order."""
    if header(scope, name) is None:
        return []
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]
