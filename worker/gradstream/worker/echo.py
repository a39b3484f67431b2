"""The children's log files, followed for what a person at the terminal should see."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

_LOUD = frozenset({"warning", "error", "critical"})
_MAX_READ_BYTES = 256 * 1024
_MAX_LINE_CHARS = 400
_HIDDEN_FIELDS = frozenset({"event", "level", "logger", "process", "timestamp", "exception"})


@dataclass(frozen=True, slots=True)
class LoudLine:
    """One warning or error of a child, as text of at most 400 characters."""

    level: str
    text: str


class LogTail:
    """Follows one file from where it ends now. Not for concurrent use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def read(self) -> Iterator[LoudLine]:
        """Warnings and errors that were appended since the last call; at most 256 KB of file a call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as log:
            if log.seek(0, os.SEEK_END) < self._offset:
                # It was rotated.
                self._offset = 0
            log.seek(self._offset)
            data = log.read(_MAX_READ_BYTES)
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        # A line without an end must not grow for ever.
        self._rest = self._rest[-_MAX_READ_BYTES:]
        for line in lines:
            if (loud := loud_line(line)) is not None:
                yield loud


def loud_line(line: bytes) -> LoudLine | None:
    """The warning or error in one line of JSON log; None for anything else, tracebacks included (they stay in the file)."""
    try:
        event = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError:
        return None
    level = str(event.get("level", ""))
    if level not in _LOUD:
        return None
    facts = " ".join(f"{name}={value}" for name, value in event.items() if name not in _HIDDEN_FIELDS)
    text = f"{event.get('event', '')} {facts}".strip().replace("\n", " ")
    return LoudLine(level, text if len(text) <= _MAX_LINE_CHARS else text[: _MAX_LINE_CHARS - 3] + "...")
