"""Commits in order from a thread, while the gang already runs the next batch."""

import threading
from collections import deque
from collections.abc import Callable

import structlog

from gradstream.shared.errors import QueueFull, Unavailable
from gradstream.shared.joblog.port import Commit, Feed, Fenced
from gradstream.worker.fence import exit_fenced
from gradstream.worker.patience import TICK_S, wait_until

# The commit on its way and one behind it. With Redis away no more work is taken than this.
MAX_PENDING = 2

_log = structlog.get_logger(__name__)


class Committer:
    """Keeps every commit in memory until Redis has it.

    log puts a commit on disk first: what Redis has, the disk has too. A commit is idempotent by (epoch, number), so it is sent again
    for as long as Redis is away; only a newer epoch ends that.
    """

    def __init__(
        self, feed: Feed, *, log: Callable[[Commit], None], on_fenced: Callable[[str], None] = exit_fenced
    ) -> None:
        self._feed = feed
        self._log = log
        self._on_fenced = on_fenced
        self._pending: deque[Commit] = deque()
        self._changed = threading.Condition()
        self._error: Exception | None = None
        self._closing = False
        self._last_number = 0
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, commit: Commit, *, on_tick: Callable[[], None]) -> None:
        """Queue a commit; waits while MAX_PENDING are on their way, calling on_tick every few seconds. Raises what broke the thread."""
        self._wait(lambda: len(self._pending) < MAX_PENDING, on_tick)
        with self._changed:
            self._pending.append(commit)
            self._changed.notify_all()

    def flush(self, *, on_tick: Callable[[], None]) -> None:
        """Return when every queued commit is recorded. Raises what broke the thread."""
        self._wait(lambda: not self._pending, on_tick)

    def wait_recorded(self, number: int) -> bool:
        """Return when the batch of this number is recorded, for any thread; False when the committer broke or was closed before."""
        with self._changed:
            self._changed.wait_for(lambda: self._last_number >= number or self._error is not None or self._closing)
            return self._last_number >= number

    def wait_for_queued(self) -> bool:
        """Return when what is queued now is recorded, for any thread; False when the committer broke or was closed before."""
        with self._changed:
            number = self._pending[-1].number if self._pending else self._last_number
        return self.wait_recorded(number)

    def close(self) -> None:
        """End the thread after a flush."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout=TICK_S)

    def _wait(self, is_done: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        wait_until(self._changed, is_done, error=lambda: self._error, on_tick=on_tick)

    def _run(self) -> None:
        try:
            while (commit := self._next()) is not None:
                self._log(commit)
                self._record(commit)
                with self._changed:
                    self._pending.popleft()
                    self._last_number = commit.number
                    self._changed.notify_all()
        except Fenced as error:
            self._fail(error)
            self._on_fenced(str(error))
        except Exception as error:  # noqa: BLE001 - the guard of a background task
            # The background-task guard: the leader raises it on its own thread.
            _log.exception("committer_failed")
            self._fail(error)

    def _next(self) -> Commit | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or bool(self._pending))
            return self._pending[0] if self._pending else None

    def _record(self, commit: Commit) -> None:
        while True:
            try:
                self._feed.commit(commit)
            except (Unavailable, QueueFull) as error:
                _log.warning("commit_unreachable", number=commit.number, reason=error.message)
            else:
                return

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
