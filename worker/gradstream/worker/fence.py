"""The lease of rank 0: taken at start, renewed by a thread of its own, and the end of the process when it is lost."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import structlog

from gradstream.shared.clock import Clock
from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog.port import Feed, Fenced

RENEW_EVERY_S = 3.0
ACQUIRE_EVERY_S = 1.0
# EX_TEMPFAIL: another gang leads; the launcher may try again later.
EXIT_FENCED = 75

_log = structlog.get_logger(__name__)


def exit_fenced(reason: str) -> NoReturn:
    """End this process at once, so that nothing of a replaced epoch is written any more. No clean-up runs."""
    _log.error("fenced", reason=reason)
    os._exit(EXIT_FENCED)


@dataclass(slots=True)
class StopRequest:
    """Set by a signal handler, read by the loops. A plain flag, because a handler must not take locks."""

    asked: bool = False

    def ask(self, *_: object) -> None:
        """The handler."""
        self.asked = True


def acquire(feed: Feed, *, owner: str, clock: Clock, timeout_s: float, stop: StopRequest, above: int = 0) -> int | None:
    """The new epoch, higher than above; None when asked to stop before. Waits for another owner's lease to run out, and for Redis.

    Raises Unavailable after timeout_s.
    """
    deadline_s = clock.monotonic_s() + timeout_s
    pause = threading.Event()
    while not stop.asked:
        try:
            return feed.acquire(owner=owner, above=above)
        except Unavailable as error:
            if clock.monotonic_s() >= deadline_s:
                raise
            _log.warning("lease_wait", reason=error.message)
            pause.wait(ACQUIRE_EVERY_S)
    return None


class LeaseKeeper:
    """Renews the lease every RENEW_EVERY_S until closed, over a connection of its own.

    An absent Redis is waited out: nobody else can take the lease there meanwhile. Fenced calls on_fenced.
    """

    def __init__(self, feed: Feed, *, epoch: int, on_fenced: Callable[[str], None] = exit_fenced) -> None:
        self._feed = feed
        self._epoch = epoch
        self._on_fenced = on_fenced
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop renewing. Does not wait for a renewal that is stuck on an absent Redis."""
        self._closing.set()
        self._thread.join(timeout=RENEW_EVERY_S)

    def _run(self) -> None:
        while not self._closing.wait(RENEW_EVERY_S):
            try:
                self._feed.renew(self._epoch)
            except Unavailable as error:
                _log.warning("lease_unreachable", reason=error.message)
            except Fenced as error:
                self._on_fenced(str(error))
                return
            except Exception:  # noqa: BLE001 - the guard of a background task
                # Without renewals another gang could take over while this one is well.
                _log.exception("lease_renewal_failed")
