"""The one table from error codes to HTTP statuses, and the body that every HTTP error has."""

import math
from collections.abc import Mapping

import msgspec
from fastapi import Response

from gradstream.shared.errors import GradstreamError, InvalidRequest, QueueFull

# 408, 409 and 5xx are repeated silently by the SDK, so an error that the client must act on is none of them.
STATUS_OF_CODE: Mapping[str, int] = {
    "error": 500,
    "user_error": 400,
    "invalid_request": 400,
    "unknown_model": 404,
    "sequence_conflict": 400,
    "non_finite": 400,
    "checkpoint_exists": 400,
    "unsupported": 400,
    "payload_too_large": 413,
    "budget_exceeded": 400,
    "forbidden": 403,
    "server_error": 500,
    "model_lost": 410,
    "sequence_gap": 410,
    "queue_full": 429,
    "unavailable": 503,
    "engine_failure": 500,
    "out_of_memory": 500,
    "storage_failure": 500,
    "storage_limit": 507,
}
UNAVAILABLE_RETRY_AFTER_S = 5


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """error: the stable code. detail: what was wrong and what would be right."""

    error: str
    detail: str
    category: str


def response_of(error: GradstreamError, *, status: int | None = None) -> Response:
    """The HTTP answer for an error; retryable ones say when to come back."""
    body = ErrorBody(error=error.code, detail=error.message, category=error.category)
    headers = {}
    if error.retryable:
        wait_s = error.retry_after_s if isinstance(error, QueueFull) else UNAVAILABLE_RETRY_AFTER_S
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    return Response(
        msgspec.json.encode(body),
        status_code=STATUS_OF_CODE[error.code] if status is None else status,
        headers=headers,
        media_type="application/json",
    )


def http_error(status: int, *, code: str, detail: str) -> Response:
    """An error that has no GradstreamError: an unknown path, a wrong method, a bug."""
    category = "user" if status < 500 else "server"
    return Response(
        msgspec.json.encode(ErrorBody(error=code, detail=detail, category=category)),
        status_code=status,
        media_type="application/json",
    )


def require(condition: bool, message: str) -> None:
    """Raise InvalidRequest with the message unless the condition holds."""
    if not condition:
        raise InvalidRequest(message)
