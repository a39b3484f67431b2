"""When the request that is being answered arrived."""

from contextvars import ContextVar

from gradstream.shared.clock import Clock

# By the clock's monotonic time; None outside a request.
_ARRIVED_S: ContextVar[float | None] = ContextVar("arrived_s", default=None)


def note_arrival(clock: Clock) -> None:
    """Note that a request arrives now, for everything that is done to answer it."""
    _ARRIVED_S.set(clock.monotonic_s())


def arrived_s(clock: Clock) -> float:
    """When the request arrived, by the clock's monotonic time; now, outside a request."""
    noted = _ARRIVED_S.get()
    return clock.monotonic_s() if noted is None else noted
