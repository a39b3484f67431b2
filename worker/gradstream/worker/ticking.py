"""Keeps the followers' wait alive from a thread, while rank 0 is busy alone before it serves.

Until then rank 0 waits for the lease or for room on the disk, reads the log, and agrees with Redis: each of these may take longer
than a follower waits in a broadcast.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import structlog

from gradstream.worker.control import IDLE_TICK_S

_log = structlog.get_logger(__name__)


class Channel(Protocol):
    """What a tick needs (`gradstream.worker.control.Control`)."""

    num_ranks: int

    def idle(self) -> None:
        """Keep the followers' wait alive."""
        ...


class Ticking:
    """Sends a tick every every_s from start to finish, but not while `paused`: the channel has one sender at a time."""

    def __init__(self, channel: Channel, *, every_s: float = IDLE_TICK_S) -> None:
        self._channel = channel
        self._every_s = every_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ticks", daemon=True)

    def start(self) -> None:
        """Begin; a gang of one rank has nobody to tell."""
        if self._channel.num_ranks > 1:
            self._thread.start()

    def finish(self) -> None:
        """Return when no tick is on its way and none will come. Raises what broke the channel."""
        self._closing.set()
        with self.paused():
            pass

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No tick is sent in the block. Raises what broke the channel."""
        with self._lock:
            if self._error is not None:
                raise self._error
            yield

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            with self._lock:
                if self._closing.is_set():
                    return
                try:
                    self._channel.idle()
                except Exception as error:  # noqa: BLE001 - the guard of a background task
                    # A follower is gone; rank 0 raises it when it next needs one.
                    _log.warning("followers_unreachable", reason=str(error))
                    self._error = error
                    return
