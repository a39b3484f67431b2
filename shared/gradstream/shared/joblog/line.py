"""One connection to Redis for pipelines: redis-py connects and logs in, then the bytes come here without asyncio's streams."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse
from redis.exceptions import TimeoutError as RedisTimeoutError

# Replies are as varied as the commands; each caller knows its own. redis-py's connections have no types.
Reply = Any
Connection = Any
# The replies of one exchange, errors of Redis among them, or why there are none.
Then = Callable[[list[Reply] | Exception], None]


class Line(asyncio.Protocol):
    """Sends one pipeline at a time and hands its replies on as they come, within the turn of the loop that received them.

    connection: of redis-py, not connected yet. exchange_s: from the first byte sent to the last one received; a server that takes longer
    counts as gone.
    """

    def __init__(self, connection: Connection, *, exchange_s: float) -> None:
        self.connection = connection
        self._exchange_s = exchange_s
        self._transport: asyncio.Transport | None = None
        # redis-py's own, which learns how the connection ends.
        self._former: asyncio.BaseProtocol | None = None
        self._reader = _reader()
        self._then: Then | None = None
        self._replies: list[Reply] = []
        self._num_replies = 0
        self._deadline_s = 0.0
        # Looks again at the deadline, which moves while it waits: a timer for each exchange would cost more than this.
        self._watch: asyncio.TimerHandle | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    async def open(self) -> None:
        """Connect, log in, and take the transport over. Raises what redis-py does, RedisTimeoutError also for a login without answer."""
        try:
            async with asyncio.timeout(self._exchange_s):
                # Of one that ended by itself redis-py knows nothing yet.
                await self.connection.disconnect()
                await self.connection.connect_check_health(check_health=False)
        except TimeoutError as error:
            raise self._too_late() from error
        transport: asyncio.Transport = self.connection._writer.transport  # noqa: SLF001  redis-py has no other way to it
        if transport.is_closing():
            raise RedisConnectionError("Redis closed the connection after the login")
        self._former = transport.get_protocol()
        self._reader = _reader()
        transport.set_protocol(self)
        self._transport = transport

    async def close(self) -> None:
        """Drop the connection; open() may be called again."""
        self._fail(RedisConnectionError("the connection was closed"))
        await self.connection.disconnect()

    def send(self, packed: Sequence[bytes], num_replies: int, then: Then) -> None:
        """Send one command or more; then gets their replies, or RedisConnectionError or RedisTimeoutError.

        The line is open, and nothing is under way.
        """
        assert self._transport is not None
        assert self._then is None
        self._then, self._replies, self._num_replies = then, [], num_replies
        loop = asyncio.get_running_loop()
        self._deadline_s = loop.time() + self._exchange_s
        if self._watch is None:
            self._watch = loop.call_at(self._deadline_s, self._look, loop)
        self._transport.writelines(packed)

    async def exchange(self, packed: Sequence[bytes], num_replies: int) -> list[Reply]:
        """send for a coroutine; connects where that must be done first."""
        if not self.is_open:
            await self.open()
        outcome: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()

        def then(replies: list[Reply] | Exception) -> None:
            if outcome.done():
                return
            outcome.set_exception(replies) if isinstance(replies, Exception) else outcome.set_result(replies)

        self.send(packed, num_replies, then)
        try:
            return await outcome
        finally:
            if outcome.cancelled():
                self._fail(RedisConnectionError("nobody waits for the answer any more"))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not False:
                # A server that is loading or full says so in the place of an answer.
                if isinstance(reply, RedisConnectionError):
                    self._fail(reply)
                    return
                self._replies.append(reply)
        except InvalidResponse as error:
            self._fail(RedisConnectionError(f"no answer of Redis: {error}"))
            return
        if self._then is None or len(self._replies) > self._num_replies:
            self._fail(RedisConnectionError("an answer came that nobody waits for"))
        elif len(self._replies) == self._num_replies:
            then, replies, self._then, self._replies = self._then, self._replies, None, []
            then(replies)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._former is not None:
            self._former.connection_lost(exc)
        self._fail(
            RedisConnectionError(f"Redis closed the connection: {exc}" if exc else "Redis closed the connection")
        )

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watch = None
        if self._then is None:
            return
        if loop.time() < self._deadline_s:
            self._watch = loop.call_at(self._deadline_s, self._look, loop)
        else:
            self._fail(self._too_late())

    def _too_late(self) -> RedisTimeoutError:
        return RedisTimeoutError(f"no answer within {self._exchange_s:.0f} s")

    def _fail(self, error: Exception) -> None:
        """Let the connection go, and end what is under way."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        then, self._then, self._replies = self._then, None, []
        if then is not None:
            then(error)


def _reader() -> hiredis.Reader:
    return hiredis.Reader(protocolError=InvalidResponse, replyError=DefaultParser.parse_error)
