"""Large bodies are received a few at a time, so that each turn of the event loop stays short for everything small."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

# Two are worked on by threads while the next two come in.
_AT_ONCE = 4
# A client on the same machine or network has more of its body ready well before this.
_PATIENCE_S = 0.005


class Receiving:
    """Lets a few large bodies be read from their connections at once, in the order in which they ask.

    uvicorn reads no further on a connection whose body nobody takes, so the others wait in the hands of the kernel and of their clients.
    Without this, a turn of the loop copies up to 256 KiB from each of a hundred connections before it comes to a heartbeat. A body of which
    nothing comes for 5 ms lets the next one in and asks again when it has more, so that slow clients hold nobody up.
    """

    def __init__(self, *, at_once: int = _AT_ONCE, patience_s: float = _PATIENCE_S) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._patience_s = patience_s

    async def parts(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The parts of one body, as its turns allow. Close it when it is not read to its end."""
        loop, turn = asyncio.get_running_loop(), _Turn(self._turns)
        try:
            while True:
                await turn.take()
                impatience = loop.call_later(self._patience_s, turn.give)
                try:
                    part = await anext(stream)
                except StopAsyncIteration:
                    return
                finally:
                    impatience.cancel()
                yield part
        finally:
            turn.give()


class _Turn:
    """One body's hold on a semaphore, which it may have or not."""

    def __init__(self, turns: asyncio.Semaphore) -> None:
        self._turns = turns
        self._is_held = False

    async def take(self) -> None:
        if not self._is_held:
            await self._turns.acquire()
            self._is_held = True

    def give(self) -> None:
        if self._is_held:
            self._is_held = False
            self._turns.release()
