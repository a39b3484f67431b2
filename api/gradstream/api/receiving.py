"""Large bodies are received a part at a time, so that each turn of the event loop stays short for everything small."""

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator


class Receiving:
    """Lets one part of one large body be taken in each turn of the event loop, those of the first body first.

    uvicorn reads no further on a connection whose body nobody takes, so the others wait in the hands of the kernel and of their clients.
    Without this, a turn copies up to 256 KiB from each of a hundred connections before it comes to a heartbeat, and the first body is
    whole when the last one is. A body of which nothing has come is not in the queue, so slow clients hold nobody up.
    """

    def __init__(self) -> None:
        self._num_bodies = 0
        # By the number of the body.
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._is_scheduled = False

    async def parts(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The parts of one body, each as its turn comes."""
        number = self._num_bodies = self._num_bodies + 1
        while True:
            await self._turn(number)
            try:
                part = await anext(stream)
            except StopAsyncIteration:
                return
            yield part

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
