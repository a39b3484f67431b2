"""Waiting for a background thread without leaving the followers alone."""

import threading
from collections.abc import Callable

TICK_S = 5.0


def wait_until(
    changed: threading.Condition,
    is_done: Callable[[], bool],
    *,
    error: Callable[[], Exception | None],
    on_tick: Callable[[], None],
) -> None:
    """Return when is_done, asked under changed, says so; calls on_tick every TICK_S. Raises what error gives: the thread broke."""
    while True:
        with changed:
            done = changed.wait_for(lambda: error() is not None or is_done(), timeout=TICK_S)
            if (broke := error()) is not None:
                raise broke
        if done:
            return
        on_tick()
