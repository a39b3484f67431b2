"""Waking those who wait for futures: one reader of the note stream per process."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import redis.asyncio
import structlog

from gradstream.shared.joblog.client import BLOCK_MS
from gradstream.shared.joblog.done import block_of_future
from gradstream.shared.joblog.keys import Keys

_log = structlog.get_logger(__name__)
_COUNT = 1000
_RECONNECT_DELAY_S = 0.2
_CANCEL_AGAIN_S = 0.1
T = TypeVar("T")
_Entry = tuple[bytes, dict[bytes, bytes]]


class NoteTail:
    """Follows the note stream on a connection of its own and sets the events of local waiters.

    An event may be set without its future being done (after a reconnect, or when notes were missed): the waiter looks again.
    """

    def __init__(self, client: "redis.asyncio.Redis", keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._events: dict[str, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start following."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop following, and wake everybody."""
        if self._task is not None:
            # A cancellation can get lost inside the client while it connects, so it is repeated until the task has ended.
            while not self._task.done():
                self._task.cancel()
                await asyncio.wait({self._task}, timeout=_CANCEL_AGAIN_S)
            self._task = None
        self._wake_all()

    @contextmanager
    def watch(self, name: str) -> Iterator[asyncio.Event]:
        """An event that is set when the future of that id, or a sample of that block, may have finished. Enter it before looking."""
        event = asyncio.Event()
        self._events.setdefault(name, set()).add(event)
        try:
            yield event
        finally:
            events = self._events[name]
            events.discard(event)
            if not events:
                del self._events[name]

    async def until(self, name: str, look: Callable[[], Awaitable[T]], *, timeout_s: float) -> T:
        """What look gives as soon as that is true, else what it gives after timeout_s. It is asked again whenever name is woken."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        with self.watch(name) as event:
            while True:
                event.clear()
                found = await look()
                if found or loop.time() >= deadline:
                    return found
                try:
                    async with asyncio.timeout_at(deadline):
                        await event.wait()
                except TimeoutError:
                    continue

    async def _run(self) -> None:
        while True:
            try:
                await self._follow()
            except Exception as error:  # noqa: BLE001  a background task's guard: without it waiters would sleep on
                _log.warning("note_stream_reading_failed", error=repr(error))
                await asyncio.sleep(_RECONNECT_DELAY_S)

    async def _follow(self) -> None:
        newest = cast("list[_Entry]", await self._client.xrevrange(self._keys.notes, count=1))
        position = _number(newest[0][0]) if newest else 0
        # Waiters looked before this position was known, so they look once more.
        self._wake_all()
        while True:
            streams = await self._client.xread({self._keys.notes: f"{position}-0"}, count=_COUNT, block=BLOCK_MS)
            reply = cast("list[tuple[bytes, list[_Entry]]]", streams)
            for entry_id, fields in reply[0][1] if reply else []:
                if _number(entry_id) != position + 1:
                    self._wake_all()
                position = _number(entry_id)
                for future_id in fields[b"futures"].decode().split(" "):
                    self._wake(future_id)
                    block = block_of_future(future_id)
                    if block is not None:
                        self._wake(block)

    def _wake(self, name: str) -> None:
        for event in self._events.get(name, ()):
            event.set()

    def _wake_all(self) -> None:
        for name in self._events:
            self._wake(name)


def _number(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
