"""Waking those who wait for futures: one reader of the note stream per process."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import redis.asyncio
import structlog

from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.joblog.client import BLOCK_MS
from gradstream.shared.joblog.done import block_of_future
from gradstream.shared.joblog.keys import Keys

_log = structlog.get_logger(__name__)
_COUNT = 1000
_RECONNECT_DELAY_S = 0.2
_CANCEL_AGAIN_S = 0.1
# More open futures of one process are looked for, as those of others are.
_MAX_UNNOTED = 20_000
T = TypeVar("T")
_Entry = tuple[bytes, dict[bytes, bytes]]


class NoteTail:
    """Follows the note stream on a connection of its own and sets the events of local waiters.

    An event may be set without its future being done (after a reconnect, or when notes were missed): the waiter looks again. Of futures
    that were submitted here it knows whether a note has named them, as long as it misses none: a poll need not look for what is not there.
    """

    def __init__(self, client: "redis.asyncio.Redis", keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._events: dict[str, set[asyncio.Event]] = {}
        # Futures that were submitted here since notes are followed without a gap, and that none has named; the tenant once it is accepted.
        self._unnoted: dict[str, TenantId | None] = {}
        self._is_following = False
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

    def submitting(self, future_id: FutureId) -> None:
        """A job is about to be submitted; end with `accepted` or `not_accepted`."""
        if self._is_following and len(self._unnoted) < _MAX_UNNOTED:
            self._unnoted[future_id] = None

    def accepted(self, future_id: FutureId, tenant: TenantId) -> None:
        """The tenant's job was accepted, and it was a new one."""
        if future_id in self._unnoted:
            self._unnoted[future_id] = tenant

    def not_accepted(self, future_id: FutureId) -> None:
        """It was refused, or known already, or nobody knows. Who waits for it looks again: it may have been accepted and noted before."""
        self._wake(future_id)

    def met(self, future_id: FutureId) -> None:
        """The future was looked for, and is done or gone."""
        self._unnoted.pop(future_id, None)

    def is_unnoted(self, future_id: FutureId, tenant: TenantId | None) -> bool:
        """True when this is a future of the tenant for which a note is still to come."""
        return tenant is not None and self._unnoted.get(future_id) == tenant

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

    async def until(
        self, name: str, look: Callable[[], Awaitable[T]], *, timeout_s: float, is_false_now: bool = False
    ) -> T:
        """What look gives as soon as that is true, else what it gives after timeout_s. It is asked again whenever name is woken.

        is_false_now: it is known without a look that this one would be in vain.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        with self.watch(name) as event:
            while True:
                event.clear()
                if not is_false_now:
                    found = await look()
                    if found or loop.time() >= deadline:
                        return found
                is_false_now = False
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
                self._is_following = False
                self._unnoted.clear()
                _log.warning("note_stream_reading_failed", error=repr(error))
                await asyncio.sleep(_RECONNECT_DELAY_S)

    async def _follow(self) -> None:
        position = await self._newest()
        # Waiters looked before this position was known, so they look once more.
        self._wake_all()
        self._is_following = True
        while True:
            streams = await self._client.xread({self._keys.notes: f"{position}-0"}, count=_COUNT, block=BLOCK_MS)
            reply = cast("list[tuple[bytes, list[_Entry]]]", streams)
            if not reply and await self._newest() < position:
                # Redis was emptied, or put back in time: what comes now has numbers that were followed already.
                return
            for entry_id, fields in reply[0][1] if reply else []:
                if _number(entry_id) != position + 1:
                    self._wake_all()
                position = _number(entry_id)
                for future_id in fields[b"futures"].decode().split(" "):
                    self._wake(future_id)
                    block = block_of_future(future_id)
                    if block is not None:
                        self._wake(block)

    async def _newest(self) -> int:
        """The number of the newest note, 0 for none."""
        newest = cast("list[_Entry]", await self._client.xrevrange(self._keys.notes, count=1))
        return _number(newest[0][0]) if newest else 0

    def _wake(self, name: str) -> None:
        self._unnoted.pop(name, None)
        for event in self._events.get(name, ()):
            event.set()

    def _wake_all(self) -> None:
        self._unnoted.clear()
        for name in self._events:
            self._wake(name)


def _number(entry_id: bytes) -> int:
    return int(entry_id.partition(b"-")[0])
