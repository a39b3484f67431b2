"""A budget of bytes for the request bodies in flight."""

from collections.abc import Iterator
from contextlib import contextmanager

from gradstream.shared.errors import QueueFull


class ByteBudget:
    """Counts bytes held by requests of one event loop; refuses instead of queueing, so that memory stays bounded."""

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        """A lease that starts at nothing, grows with `take`, and gives everything back at the end."""
        lease = Lease(self)
        try:
            yield lease
        finally:
            self._held_bytes -= lease.held_bytes

    def add(self, count: int) -> None:
        """Hold count more bytes. Raises QueueFull when they do not fit."""
        if self._held_bytes + count > self._total_bytes:
            raise QueueFull(
                f"the bodies in flight fill the server's {self._total_bytes} bytes for them; send this one again later",
                retry_after_s=1.0,
            )
        self._held_bytes += count


class Lease:
    """What one request holds of a ByteBudget."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.held_bytes = 0

    def take(self, count: int) -> None:
        """Hold count more bytes. Raises QueueFull when they do not fit."""
        self._budget.add(count)
        self.held_bytes += count
