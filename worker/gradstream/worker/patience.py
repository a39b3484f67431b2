"""Waiting: for a background thread without leaving the followers alone, and for room on the disk."""

import errno
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from gradstream.shared.errors import StorageFailure

TICK_S = 5.0
ROOM_RETRY_S = 1.0
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})

T = TypeVar("T")
_log = structlog.get_logger(__name__)


def wait_until(
    changed: threading.Condition,
    is_done: Callable[[], bool],
    *,
    error: Callable[[], Exception | None],
    on_tick: Callable[[], None],
) -> None:
    """Return when is_done, asked under changed, says so; calls on_tick every TICK_S. Raises what error gives: the thread broke."""
    while True:
        with changed:
            done = changed.wait_for(lambda: error() is not None or is_done(), timeout=TICK_S)
            if (broke := error()) is not None:
                raise broke
        if done:
            return
        on_tick()


def when_there_is_room(work: Callable[[], T], *, is_over: Callable[[], bool]) -> T | None:
    """What work returns, tried again once a second while the disk is full, which is logged; None when is_over says so before.

    Raises every other StorageFailure: one that waiting does not mend.
    """
    while not is_over():
        try:
            return work()
        except StorageFailure as failure:
            if not (isinstance(failure.__cause__, OSError) and failure.__cause__.errno in _NO_ROOM):
                raise
            _log.error("joblog_not_written", reason=failure.message, waits="for room on the disk")
            time.sleep(ROOM_RETRY_S)
    return None
