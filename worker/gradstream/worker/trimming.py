"""The log on disk kept within its bounds by a gang that takes no snapshots, behind which it would be trimmed."""

import threading

import structlog

from gradstream.shared.clock import Clock
from gradstream.shared.errors import StorageFailure
from gradstream.worker.commit import Committer
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.disklog.retention import retain
from gradstream.worker.journal import Journal
from gradstream.worker.keeping import Durability

TRIM_EVERY_S = 60.0

_log = structlog.get_logger(__name__)


class Trimmer:
    """Removes segments that end before the oldest open job, as far as the bounds ask for it. A thread of its own calls `trim`."""

    def __init__(
        self,
        journal: Journal,
        committer: Committer,
        *,
        durability: Durability,
        clock: Clock,
        every_s: float = TRIM_EVERY_S,
    ) -> None:
        self._journal = journal
        self._committer = committer
        self._durability = durability
        self._clock = clock
        self._every_s = every_s
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log-trimmer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread; the committer is closed before, so nothing keeps it waiting."""
        self._closing.set()
        self._thread.join()

    def trim(self) -> list[str]:
        """The names of the segments that were removed."""
        before = self._journal.scan_from()
        # What was logged before that place and is not in Redis yet must stay.
        if not self._committer.wait_for_queued():
            return []
        try:
            return retain(
                self._durability.joblog,
                before=before,
                max_bytes=self._durability.retention_bytes,
                max_age_s=self._durability.retention_s,
                clock=self._clock,
            )
        except (StorageFailure, UnknownPosition) as error:
            # Nothing needs it to be gone.
            _log.warning("past_not_trimmed", reason=str(error))
            return []

    def _run(self) -> None:
        while not self._closing.wait(self._every_s):
            try:
                self.trim()
            except Exception:  # noqa: BLE001 - the guard of a background task
                # Nothing needs the log to be short; the next try may succeed.
                _log.exception("log_trimmer_failed")
