"""What both dialects answer to retrieve_future alike."""

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Response

from gradstream.api.errors import http_error, response_of
from gradstream.api.futures import Pending
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import FutureId


# Any: small free-form JSON answers.
def json_answer(content: Mapping[str, Any], *, status: int = 200) -> Response:
    """The content as it is."""
    return Response(msgspec.json.encode(content), status_code=status, media_type="application/json")


def try_again(future_id: FutureId, pending: Pending, *, status: int = 200) -> Response:
    """The job is not done: poll again."""
    content = {"type": "try_again", "request_id": future_id, "queue_state": pending.state}
    return json_answer({**content, "queue_state_reason": pending.reason}, status=status)


def no_such_future(request_id: str) -> Response:
    """404: there never was such a future, or it is another tenant's."""
    return response_of(UnknownModel(f"request_id: there is no future {request_id[:80]!r}"))


def no_longer_kept(future_id: FutureId) -> Response:
    """410: there was such a future."""
    return http_error(410, code="expired", detail=f"request_id: the result of {future_id!r} is no longer kept")
