"""Where a log tool reads: the log of a server, running or not, or an exported file."""

import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.archive import archive_frames
from gradstream.worker.disklog.errors import LogDamaged, NoExport, UnknownPosition
from gradstream.worker.disklog.frames import Frame, LoggedBatch, Position
from gradstream.worker.disklog.framing import AnyFrame
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.salvage import AroundDamage
from gradstream.worker.disklog.segments import segment_paths
from gradstream.worker.inspect.place import CannotLook, engines_in, names_of

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d)")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def open_log(directory: Path) -> DiskLog:
    """The log in a directory. Raises CannotLook when there is none, naming the engines that have one."""
    if not segment_paths(directory):
        engines = engines_in(directory.parent)
        others = f"; there are logs of the engine(s) {names_of(engines)}: give --engine" if engines else ""
        raise CannotLook(f"{directory}: there is no job log; the server keeps it there once a gang has led{others}")
    return DiskLog(directory)


class Frames:
    """Frames of a log around what is damaged in it, or of an exported file as far as it reads."""

    def __init__(self, *, log: AroundDamage | None = None, file: Path | None = None) -> None:
        self._log = log
        self._file = file
        self._damage: LogDamaged | None = None

    def __iter__(self) -> Iterator[AnyFrame]:
        if self._file is not None:
            yield from self._exported(self._file)
            return
        assert self._log is not None, "a log or a file"
        for _, frame in self._log.scan():
            yield frame

    @property
    def skipped(self) -> str | None:
        """What could not be read so far, in one line; None when all could."""
        if self._log is not None:
            return self._log.skipped()
        return None if self._damage is None else self._damage.message

    def _exported(self, file: Path) -> Iterator[AnyFrame]:
        try:
            yield from archive_frames(file)
        except NoExport as error:
            raise CannotLook(f"{file}: {error.reason}; give a file that `gradstream log export` made") from error
        except LogDamaged as error:
            self._damage = error
        except OSError as error:
            raise CannotLook(f"{file}: cannot be read: {error.strerror}") from error


class Following:
    """The frames of a log as they come.

    When a new gang voids what was seen last, or segments went meanwhile, the log is read from its start again, and only batches behind
    the last one seen are given; on_restart is called before.
    """

    def __init__(self, log: DiskLog, *, on_restart: Callable[[], None]) -> None:
        self._log = log
        self._on_restart = on_restart
        self._at: Position | None = None
        self._last = BatchId(0, 0)
        self._is_catching_up = False

    def new(self) -> Iterator[tuple[Frame, bool]]:
        """The frames since the last call, each with whether it is news. Raises LogDamaged."""
        try:
            yield from self._scan()
        except UnknownPosition:
            # Raised before the first frame, if at all.
            self._at, self._is_catching_up = None, True
            self._on_restart()
            yield from self._scan()
        self._is_catching_up = False

    def forever(self, *, every_s: float) -> Iterator[tuple[Frame, bool]]:
        """new, again and again."""
        while True:
            yield from self.new()
            time.sleep(every_s)

    def _scan(self) -> Iterator[tuple[Frame, bool]]:
        """What stands behind the last frame seen."""
        seen = self._at
        for position, frame in self._log.scan(seen):
            if position == seen:
                continue
            self._at = position
            if isinstance(frame, LoggedBatch) and frame.batch_id > self._last:
                self._last, self._is_catching_up = frame.batch_id, False
            yield frame, not self._is_catching_up


def since_ms(text: str | None, *, now_ms: int) -> int:
    """The moment that 90s, 10m, 2h, 3d (ago), a date or a time (UTC) means; 0 for None. Raises ValueError."""
    if text is None:
        return 0
    if (match := _DURATION.fullmatch(text.strip())) is not None:
        return now_ms - int(1000 * float(match[1]) * _SECONDS[match[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a time such as 10m, 2h, 3d, 2026-05-01 or 2026-05-01T12:30") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def batch_id(text: str) -> BatchId | None:
    """The batch that a text such as 3-17 names, None for any other text."""
    return BatchId.parse(text) if re.fullmatch(r"\d{1,18}-\d{1,18}", text) else None
