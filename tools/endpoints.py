"""Prints docs/endpoints.md: every call of the API, from its routes.

python tools/endpoints.py > docs/endpoints.md
"""

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi.routing import APIRoute

from gradstream.api.native.routes import RESOURCES as OWN
from gradstream.api.tinker.routes import RESOURCES
from gradstream.api.xorl.routes import RESOURCES as XORL

_HEAD = """# Endpoints

All paths are below `/api/v1`. Bodies and answers are in the OpenAPI document at `/openapi.json`; what a call with a key of another tenant sees
is what it would see if the thing did not exist. This page is made by `tools/endpoints.py` from the routes.

Calls with a `seq_id` read the header `X-Gradstream-Lane`: processes that train one model together number their requests in a lane each,
see [together.md](together.md).

Where the answer differs from a hosted service, on purpose:

- Publishing a public checkpoint, or unpublishing a private one, is 400 instead of 409: the SDK repeats every 409 for five minutes.
- `publish` marks a checkpoint; it opens it to nobody else.
- Projects are names that group sessions. Audits and bills are empty. Traces are not recorded, and an export says so.
- `archive` redirects to a tar that is made while it is read, so it never answers that it is still being built.
- Encrypted exports and losses sent by clients are refused.
- While no worker leads, at a start or while one recovers, what is not found is answered 503 with Retry-After, and a poll for it is held:
  it may yet be restored. 404 is said by a server that knows.
"""


_XORL_HEAD = """
## Calls of xorl clients

Here with their whole paths; a call that tinker clients have too is told from theirs by its body ([xorl.md](xorl.md)). Below the prefix
`/xorl`, as in `/xorl/api/v1/forward_backward`, a call is a xorl client's in any case.
"""
_TABLE = "\n| call | what it does |\n|---|---|\n"


def page() -> str:
    """The whole document."""
    return f"{_HEAD}{_TABLE}{_lines((*RESOURCES, *OWN))}{_XORL_HEAD}{_TABLE}{_lines(XORL)}"


def rows() -> Iterator[str]:
    """Every row of the document."""
    yield from _rows((*RESOURCES, *OWN, *XORL))


def _lines(resources: Iterable[Any]) -> str:
    return "".join(f"{row}\n" for row in _rows(resources))


# Any: a module with a router.
def _rows(resources: Iterable[Any]) -> Iterator[str]:
    for resource in resources:
        for route in resource.router.routes:
            if not isinstance(route, APIRoute) or not route.include_in_schema:
                continue
            first = (inspect.getdoc(route.endpoint) or "").splitlines()[0]
            path = (route.path if resource in XORL else route.path.removeprefix("/")).replace(":path}", "}")
            yield f"| {' '.join(sorted(route.methods or ()))} `{path}` | {first} |"


if __name__ == "__main__":
    sys.stdout.write(page())
