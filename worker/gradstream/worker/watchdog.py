"""Ends the process when one operation of the gang hangs, so that the launcher starts a new gang."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import structlog

from gradstream.shared.clock import Clock

EXIT_HUNG = 70

_log = structlog.get_logger(__name__)


def exit_hung(kind: str) -> NoReturn:
    """End this process at once: a thread that hangs in a collective or a kernel cannot be stopped otherwise."""
    _log.error("operation_hung", kind=kind)
    os._exit(EXIT_HUNG)


class Watchdog:
    """Calls on_hung when a watched operation takes longer than timeout_s, checked ten times within that."""

    def __init__(self, *, timeout_s: float, clock: Clock, on_hung: Callable[[str], None] = exit_hung) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_hung = on_hung
        # (kind, start) of the operation in progress; replaced as one value, so it needs no lock.
        self._current: tuple[str, float] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()

    @contextmanager
    def watch(self, kind: str) -> Iterator[None]:
        """Watch the body; kind names it in the log."""
        self._current = (kind, self._clock.monotonic_s())
        try:
            yield
        finally:
            self._current = None

    def check(self) -> None:
        """Call on_hung when the operation in progress is overdue."""
        current = self._current
        if current is not None and self._clock.monotonic_s() - current[1] > self._timeout_s:
            self._on_hung(current[0])

    def _run(self) -> None:
        while not self._closing.wait(self._timeout_s / 10):
            self.check()
