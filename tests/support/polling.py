"""Polls with a deadline, which guards against hangs alone."""

import asyncio
import time
from collections.abc import Callable

_DEADLINE_S = 240.0
_STEP_S = 0.01


async def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds; TimeoutError after four minutes."""
    async with asyncio.timeout(_DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a poll with a deadline
            await asyncio.sleep(_STEP_S)


def wait_until(
    condition: Callable[[], object], *, evidence: Callable[[], str] = lambda: "it did not happen in time"
) -> None:
    """Return once the condition holds; after four minutes the test fails, with the evidence."""
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, evidence()
        time.sleep(_STEP_S)
