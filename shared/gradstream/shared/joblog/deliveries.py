"""Acknowledgements of results on their way to the queue; nobody waits for them."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import structlog

from gradstream.shared.errors import QueueFull, Unavailable
from gradstream.shared.ids import FutureId

_log = structlog.get_logger(__name__)
# How long the first one waits for others to come along with it, so that the queue's disk is not kept from what somebody waits for.
_GATHER_S = 0.05
# In one script, which keeps the queue from everything else for as long as it runs.
_TOGETHER = 256
# Beyond this many a result's acknowledgement is dropped: the result only lives longer.
_MAX_PENDING = 100_000


class Deliveries:
    """Gathers acknowledgements and sends them some at a time, in the order in which they came.

    send: tells the queue of some futures; where it raises Unavailable or QueueFull, their results only live longer.
    """

    def __init__(self, send: Callable[[Sequence[FutureId]], Awaitable[object]]) -> None:
        self._send = send
        self._pending: deque[FutureId] = deque()
        self._task: asyncio.Task[None] | None = None

    def note(self, future_id: FutureId) -> None:
        """Take one on its way."""
        if len(self._pending) >= _MAX_PENDING:
            return
        self._pending.append(future_id)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Send what is still there."""
        if self._task is not None:
            await self._task

    async def _run(self) -> None:
        try:
            await asyncio.sleep(_GATHER_S)
            while self._pending:
                together = [self._pending.popleft() for _ in range(min(_TOGETHER, len(self._pending)))]
                await self._send_some(together)
        finally:
            self._task = None

    async def _send_some(self, together: Sequence[FutureId]) -> None:
        try:
            await self._send(together)
        except (Unavailable, QueueFull) as error:
            self._pending.clear()
            _log.warning("deliveries_not_noted", num_futures=len(together), code=error.code)
        # The guard of a background task: one odd answer of Redis must not end the acknowledgements.
        except Exception:  # noqa: BLE001
            _log.exception("deliveries_not_noted", num_futures=len(together))
