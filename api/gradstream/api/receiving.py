"""Large bodies are received a part at a time, so that each turn of the event loop stays short for everything small."""

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator

from gradstream.shared.errors import QueueFull

# A body holds room for all of it while it comes, which others wait for.
_STALLED_S = 10.0
_LEAST_BYTES_PER_S = 16 * 1024
_RETRY_AFTER_S = 1.0


class Receiving:
    """Lets one part of one large body be asked for in each turn of the event loop, those of the first body first.

    uvicorn reads no further on a connection whose body nobody takes, so the others wait in the hands of the kernel and of their clients.
    Without this, a turn copies up to 256 KiB from each of a hundred connections before it comes to a heartbeat, and the first body is
    whole when the last one is. A body that was asked for a part which has not come yet is not in the queue: slow clients hold nobody up,
    and as many parts as the network brings at once may still come in one turn, one of each body.
    """

    def __init__(self, *, stalled_s: float = _STALLED_S) -> None:
        """stalled_s: how long a body may send nothing, and how long it may be slower than 16 KiB a second."""
        self._stalled_s = stalled_s
        self._num_bodies = 0
        # By the number of the body.
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._is_scheduled = False

    async def parts(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The parts of one body, each as its turn comes. Raises QueueFull for one that comes too slowly."""
        number = self._num_bodies = self._num_bodies + 1
        loop = asyncio.get_running_loop()
        start_s, num_bytes = loop.time(), 0
        while True:
            await self._turn(number)
            try:
                async with asyncio.timeout(self._stalled_s):
                    part = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise self._too_slow(f"nothing of it came for {self._stalled_s:g} s") from error
            num_bytes += len(part)
            elapsed_s = loop.time() - start_s
            if elapsed_s > self._stalled_s and num_bytes < _LEAST_BYTES_PER_S * elapsed_s:
                raise self._too_slow(f"{num_bytes} bytes came in {elapsed_s:.0f} s")
            yield part

    @staticmethod
    def _too_slow(what: str) -> QueueFull:
        return QueueFull(
            f"body: {what}, and it held room that others wait for; send it again over a faster connection, or in smaller calls",
            retry_after_s=_RETRY_AFTER_S,
        )

    async def _turn(self, number: int) -> None:
        loop = asyncio.get_running_loop()
        turn = loop.create_future()
        heapq.heappush(self._waiting, (number, turn))
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._give)
        await turn

    def _give(self) -> None:
        """Let the first one go on, and look again in the loop's next turn."""
        while self._waiting:
            _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                asyncio.get_running_loop().call_soon(self._give)
                return
        self._is_scheduled = False
