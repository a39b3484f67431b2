"""In which order the parts of large bodies are taken."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Self

import pytest

from gradstream.api.receiving import Receiving
from gradstream.shared.errors import QueueFull


class Connection:
    """A body whose parts come when they are sent. taken: the bodies of all parts that were taken, in order, and the loop's turn of each."""

    def __init__(self, name: str, taken: list[tuple[str, int]], clock: "Turns") -> None:
        self._name = name
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._taken = taken
        self._clock = clock

    def send(self, *parts: bytes | None) -> None:
        """None: the end."""
        for part in parts:
            self._parts.put_nowait(part)

    async def stream(self) -> AsyncIterator[bytes]:
        while (part := await self._parts.get()) is not None:
            self._taken.append((self._name, self._clock.number))
            yield part


class Turns:
    """Counts the turns of the event loop."""

    def __init__(self) -> None:
        self.number = 0
        self._is_over = False

    def _turn(self) -> None:
        self.number += 1
        if not self._is_over:
            asyncio.get_running_loop().call_soon(self._turn)

    def __enter__(self) -> Self:
        self._turn()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True


async def _received(receiving: Receiving, connection: Connection) -> bytes:
    return b"".join([part async for part in receiving.parts(connection.stream())])


async def test_one_part_is_taken_in_a_turn_of_the_loop_and_the_first_body_is_whole_before_the_second_begins() -> None:
    receiving, taken = Receiving(), list[tuple[str, int]]()
    with Turns() as clock:
        connections = [Connection(name, taken, clock) for name in "abc"]
        for connection in connections:
            connection.send(b"1", b"2", b"3", None)
        bodies = await asyncio.gather(*(_received(receiving, connection) for connection in connections))
    assert bodies == [b"123"] * 3
    assert [name for name, _ in taken] == list("aaabbbccc")
    turns = [turn for _, turn in taken]
    assert len(set(turns)) == len(turns)


async def test_a_body_of_which_nothing_comes_holds_up_no_other_and_is_received_whole_later() -> None:
    receiving, taken = Receiving(), list[tuple[str, int]]()
    with Turns() as clock:
        slow, quick = Connection("slow", taken, clock), Connection("quick", taken, clock)
        slow.send(b"first ")
        waiting = asyncio.create_task(_received(receiving, slow))
        quick.send(b"quick", None)
        assert await asyncio.wait_for(_received(receiving, quick), timeout=120) == b"quick"
        slow.send(b"second", None)
        assert await asyncio.wait_for(waiting, timeout=120) == b"first second"


async def test_a_body_that_stands_still_is_refused_and_so_is_one_that_trickles() -> None:
    receiving, taken = Receiving(stalled_s=0.05), list[tuple[str, int]]()

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b""

    with pytest.raises(QueueFull, match="0 bytes came in"):
        async for _ in receiving.parts(trickle()):
            pass
    with Turns() as clock:
        still, whole = Connection("still", taken, clock), Connection("whole", taken, clock)
        still.send(b"first")
        with pytest.raises(QueueFull, match=re.escape("nothing of it came for 0.05 s")):
            await asyncio.wait_for(_received(receiving, still), timeout=120)
        whole.send(b"whole", None)
        assert await asyncio.wait_for(_received(receiving, whole), timeout=120) == b"whole"


async def test_a_client_that_goes_away_while_it_waits_for_its_turn_leaves_it_to_the_next_one() -> None:
    receiving, taken = Receiving(), list[tuple[str, int]]()
    with Turns() as clock:
        connections = [Connection(name, taken, clock) for name in "abc"]
        for connection in connections:
            connection.send(b"whole", None)
        first, second, third = (asyncio.create_task(_received(receiving, connection)) for connection in connections)
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()
        assert await asyncio.wait_for(third, timeout=120) == b"whole"
        await asyncio.gather(first, second, return_exceptions=True)
    assert [name for name, _ in taken] == ["c"]
