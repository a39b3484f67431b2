"""Work that only rank 0 can do, such as on its disk, and whose result every rank learns."""

from collections.abc import Callable

import msgspec

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.errors import (
    CheckpointExists,
    GradstreamError,
    InvalidRequest,
    StorageFailure,
    StorageLimit,
    UnknownModel,
    Unsupported,
)

# What such work may raise. Another error ends rank 0, and with it the gang.
_ERRORS: dict[str, type[GradstreamError]] = {
    error.code: error
    for error in (CheckpointExists, InvalidRequest, StorageFailure, StorageLimit, UnknownModel, Unsupported)
}


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """code is empty when the work succeeded."""

    code: str = ""
    message: str = ""
    data: bytes = b""


def on_leader(comm: Comm, work: Callable[[], bytes]) -> bytes:
    """What work returned on rank 0, on every rank; collective.

    Raises on every rank the GradstreamError that work raised on rank 0, so that all of them take the same way.
    """
    answer = _attempt(work) if comm.is_leader else None
    if comm.size > 1:
        encoded = msgspec.msgpack.encode(answer) if answer is not None else None
        answer = msgspec.msgpack.decode(comm.broadcast_bytes(encoded), type=_Answer)
    assert answer is not None
    if answer.code:
        raise _ERRORS[answer.code](answer.message)
    return answer.data


def _attempt(work: Callable[[], bytes]) -> _Answer:
    try:
        return _Answer(data=work())
    except tuple(_ERRORS.values()) as error:
        return _Answer(code=error.code, message=error.message)
