"""The key file as it is now, looked at again at most once a second."""

from pathlib import Path

import structlog

from gradstream.shared.clock import Clock
from gradstream.shared.keys.api_key import KeyRing
from gradstream.shared.keys.key_file import KeyFileError, read_keys

_LOOK_EVERY_S = 1.0
_log = structlog.get_logger(__name__)


class WatchedKeys:
    """The ring of a key file. A change counts within a second, without a restart.

    A file that is gone lets nobody in. One that cannot be used leaves the last good keys in force and is logged, once for each state
    of the file; before any good one, nobody is let in.
    """

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self._path = path
        self._clock = clock
        self._ring = KeyRing(())
        self._looked_at_s: float | None = None
        self._seen: tuple[int, ...] | None = None

    def ring(self) -> KeyRing:
        """The keys in force."""
        now_s = self._clock.monotonic_s()
        if self._looked_at_s is None or now_s - self._looked_at_s >= _LOOK_EVERY_S:
            self._looked_at_s = now_s
            self._look()
        return self._ring

    def _look(self) -> None:
        seen = self._identity()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._ring = KeyRing(read_keys(self._path))
        except FileNotFoundError:
            self._ring = KeyRing(())
            _log.error("key_file_missing", path=str(self._path))
        except KeyFileError as error:
            _log.error("key_file_unusable", problem=str(error), num_keys_in_force=len(self._ring))
        else:
            _log.info("keys_loaded", num_keys=len(self._ring))

    def _identity(self) -> tuple[int, ...]:
        """What changes whenever the file is replaced, edited or made writable; empty when it is not there."""
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
