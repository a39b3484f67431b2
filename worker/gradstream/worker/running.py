"""What the gang runs now, written to Redis for people who look: only about batches that take a while, and never in the gang's way."""

import threading
from collections.abc import Sequence

import structlog

from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import Feed, Fenced

# A batch that is over before then is not worth a write, which the queue's server syncs.
_AFTER_S = 0.25

_log = structlog.get_logger(__name__)


class RunningNote:
    """Notes a batch that still runs a quarter of a second after it began. A thread of its own writes; a lost note does no harm."""

    def __init__(self, feed: Feed, *, epoch: int) -> None:
        self._feed = feed
        self._epoch = epoch
        self._changed = threading.Condition()
        self._batch: tuple[int, str, Sequence[FutureId]] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="running-note", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; a write on its way is not waited for."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def began(self, number: int, op: str, future_ids: Sequence[FutureId]) -> None:
        """A batch begins, with everything that runs in it."""
        with self._changed:
            self._batch = (number, op, list(future_ids))
            self._changed.notify_all()

    def ended(self) -> None:
        """The batch is over."""
        with self._changed:
            self._batch = None
            self._changed.notify_all()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            with self._changed:
                if self._changed.wait_for(lambda: self._closing or self._batch is not batch, timeout=_AFTER_S):
                    continue
            number, op, future_ids = batch
            try:
                self._feed.note_running(number, op, future_ids, epoch=self._epoch)
            except (Unavailable, Fenced) as error:
                _log.debug("running_not_noted", reason=str(error))
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._batch is not batch)

    def _next(self) -> tuple[int, str, Sequence[FutureId]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._batch is not None)
            return None if self._closing else self._batch
