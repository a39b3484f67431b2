"""Whose turn it is to have its large body received."""

import asyncio
from collections.abc import AsyncIterator

from gradstream.api.receiving import Receiving

# Nothing that a test does in between takes as long.
NEVER_S = 3600.0


class Connection:
    """A body whose parts come when they are sent."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.is_read = False

    def send(self, *parts: bytes | None) -> None:
        """None: the end."""
        for part in parts:
            self._parts.put_nowait(part)

    async def stream(self) -> AsyncIterator[bytes]:
        self.is_read = True
        while (part := await self._parts.get()) is not None:
            yield part


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def _received(receiving: Receiving, connection: Connection) -> bytes:
    return b"".join([part async for part in receiving.parts(connection.stream())])


async def test_bodies_beyond_the_limit_are_not_read_before_one_of_the_first_is_whole() -> None:
    receiving, connections = Receiving(at_once=2, patience_s=NEVER_S), [Connection() for _ in range(4)]
    tasks = [asyncio.create_task(_received(receiving, connection)) for connection in connections]
    await _settle()
    assert [connection.is_read for connection in connections] == [True, True, False, False]
    connections[1].send(b"a", b"b", None)
    await _settle()
    assert [connection.is_read for connection in connections] == [True, True, True, False]
    for connection in (connections[0], *connections[2:]):
        connection.send(b"c", None)
    assert await asyncio.gather(*tasks) == [b"c", b"ab", b"c", b"c"]


async def test_a_body_of_which_nothing_comes_lets_the_next_one_in_and_is_received_whole_later() -> None:
    receiving, slow, quick = Receiving(at_once=1, patience_s=0.0), Connection(), Connection()
    slow.send(b"first ")
    waiting = asyncio.create_task(_received(receiving, slow))
    await _settle()
    quick.send(b"quick", None)
    assert await asyncio.wait_for(_received(receiving, quick), timeout=120) == b"quick"
    slow.send(b"second", None)
    assert await asyncio.wait_for(waiting, timeout=120) == b"first second"


async def test_a_client_that_goes_away_gives_its_turn_to_the_next_one() -> None:
    receiving, connections = Receiving(at_once=1, patience_s=NEVER_S), [Connection() for _ in range(3)]
    first, second, third = (asyncio.create_task(_received(receiving, connection)) for connection in connections)
    await _settle()
    second.cancel()
    await _settle()
    first.cancel()
    connections[2].send(b"whole", None)
    assert await asyncio.wait_for(third, timeout=120) == b"whole"
    assert not connections[1].is_read
    await asyncio.gather(first, second, return_exceptions=True)


async def test_a_body_that_is_refused_half_read_gives_its_turn_to_the_next_one() -> None:
    receiving, refused, after = Receiving(at_once=1, patience_s=NEVER_S), Connection(), Connection()
    refused.send(b"too much", b"more")
    parts = receiving.parts(refused.stream())
    assert await anext(parts) == b"too much"
    await parts.aclose()
    after.send(b"whole", None)
    assert await asyncio.wait_for(_received(receiving, after), timeout=120) == b"whole"
