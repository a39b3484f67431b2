"""Time as a value that is passed in."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where components take the time from."""

    def wall_ms(self) -> int:
        """Milliseconds since the Unix epoch; for records that people read, never for correctness."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back; for deadlines and durations."""
        ...


class SystemClock:
    """The machine's clocks."""

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that a test turns by hand."""

    def __init__(self, *, wall_ms: int = 1_700_000_000_000) -> None:
        self._wall_ms = wall_ms
        self._monotonic_s = 0.0

    def advance(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self._wall_ms += int(seconds * 1000)

    def wall_ms(self) -> int:
        return self._wall_ms

    def monotonic_s(self) -> float:
        return self._monotonic_s
