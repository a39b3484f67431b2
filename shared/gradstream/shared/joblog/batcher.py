"""Commands of many tasks, coalesced: what is asked within one loop tick travels as one pipeline."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import hiredis
import redis.asyncio
from redis.exceptions import NoScriptError

from gradstream.shared.joblog.line import Line, Reply
from gradstream.shared.joblog.lua import LuaScript

Value = str | bytes | int | float
# Its name, then its arguments.
Command = tuple[Value, ...]

_MAX_IN_FLIGHT = 4
# From the first byte sent to the last one received. A connection is broken when it takes longer, and its pipeline is sent again.
_EXCHANGE_S = 10.0
# Calls in one pipeline: the replies to all of them come when the last one is done.
_MAX_CALLS = 256


@dataclass(slots=True)
class _Call:
    """Commands of one caller, as they travel. names: of each, which say how redis-py reads its reply."""

    names: Sequence[str]
    packed: Sequence[bytes]
    replies: "asyncio.Future[list[Reply]]"

    @classmethod
    def of(cls, commands: Sequence[Command]) -> Self:
        """Raises what cannot be written: UnicodeEncodeError, TypeError.

        By hiredis: redis-py packs in Python, one argument after the other, which was a third of what a submission cost.
        """
        packed = [hiredis.pack_command(command) for command in commands]
        return cls([str(command[0]) for command in commands], packed, asyncio.get_running_loop().create_future())


class CommandBatcher:
    """Sends commands in pipelines, a few at a time, on connections of its own; while those are away, later commands gather.

    client: says how to connect; without a timeout of its own for answers.

    Every command must be idempotent: a pipeline is sent again when its connection breaks.
    """

    def __init__(
        self,
        client: "redis.asyncio.Redis",
        scripts: Iterable[LuaScript],
        *,
        max_in_flight: int = _MAX_IN_FLIGHT,
        max_calls: int = _MAX_CALLS,
    ) -> None:
        self._client = client
        self._scripts = tuple(scripts)
        self._max_in_flight = max_in_flight
        self._max_calls = max_calls
        self._pending: list[_Call] = []
        self._num_in_flight = 0
        self._is_scheduled = False
        # As many as pipelines were ever under way at once. The client's pool would look at each, under locks, whenever it is used.
        self._idle: list[Line] = []
        # Of pipelines that take more than one exchange on a line that is open.
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Future[None] | None = None

    async def run(self, *commands: Command) -> list[Reply]:
        """The replies to commands, which reach the server in order; raises the first error among them, or what cannot be written."""
        if not commands:
            return []
        call = _Call.of(commands)
        self._pending.append(call)
        self._schedule(asyncio.get_running_loop())
        replies = await call.replies
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def close(self) -> None:
        """Wait for what is under way, then drop the connections."""
        while self._pending or self._num_in_flight:
            self._closing = asyncio.get_running_loop().create_future()
            await self._closing
        while self._idle:
            await self._idle.pop().close()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pending and not self._is_scheduled and self._num_in_flight < self._max_in_flight:
            self._is_scheduled = True
            loop.call_soon(self._flush, loop)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send what has gathered: straight away on a line that is open, else from a task that connects first."""
        self._is_scheduled = False
        calls, self._pending = self._pending[: self._max_calls], self._pending[self._max_calls :]
        self._num_in_flight += 1
        line = self._idle.pop() if self._idle else None
        if line is not None and line.is_open:
            line.send(*_pipeline(calls), partial(self._on_replies, calls, line))
        else:
            self._in_task(self._persist(calls, line))
        self._schedule(loop)

    def _new_line(self) -> Line:
        pool: Any = self._client.connection_pool
        return Line(pool.make_connection(), exchange_s=_EXCHANGE_S)

    def _on_replies(self, calls: list[_Call], line: Line, replies: list[Reply] | Exception) -> None:
        if isinstance(replies, Exception) or _is_untaught(replies):
            self._in_task(self._persist(calls, line, first=replies))
        else:
            self._answer(calls, replies)
            self._end(line)

    def _in_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, line: Line | None) -> None:
        """A pipeline is done with, one way or the other."""
        if line is not None:
            self._idle.append(line)
        self._num_in_flight -= 1
        self._schedule(asyncio.get_running_loop())
        if self._closing is not None and not self._closing.done():
            self._closing.set_result(None)

    async def _persist(
        self, calls: list[_Call], line: Line | None, *, first: list[Reply] | Exception | None = None
    ) -> None:
        """Bring calls to an end by as many exchanges as that takes. first: how one ended that was made already. line None: a new one."""
        try:
            line = line or self._new_line()
            replies = first if isinstance(first, list) else await self._exchange(calls, line, failed=first)
            if _is_untaught(replies):
                await self._exchange([self._teaching()], line)
                replies = await self._exchange(calls, line)
            self._answer(calls, replies)
        except BaseException as error:
            for call in calls:
                if not call.replies.done():
                    call.replies.set_exception(error) if isinstance(error, Exception) else call.replies.cancel()
            if not isinstance(error, Exception):
                raise
        finally:
            self._end(line)

    def _teaching(self) -> _Call:
        return _Call.of([("SCRIPT", "LOAD", script.text) for script in self._scripts])

    async def _exchange(self, calls: list[_Call], line: Line, *, failed: Exception | None = None) -> list[Reply]:
        """The replies to all commands of calls, sent as one and again as often as redis-py's rules say; errors of Redis stand among them."""
        packed, num_replies = _pipeline(calls)

        async def attempt() -> list[Reply]:
            nonlocal failed
            if failed is not None:
                error, failed = failed, None
                raise error
            return await line.exchange(packed, num_replies)

        async def on_failure(_error: Exception) -> None:
            await line.close()

        replies: list[Reply] = await line.connection.retry.call_with_retry(attempt, on_failure)
        return replies

    def _answer(self, calls: list[_Call], replies: list[Reply]) -> None:
        """Give each call its part of the replies, as redis-py gives them."""
        start = 0
        for call in calls:
            end = start + len(call.names)
            if not call.replies.done():
                try:
                    call.replies.set_result([*map(self._viewed, call.names, replies[start:end])])
                # A reply of another shape than its command has is the caller's error alone.
                except (TypeError, ValueError, LookupError, AttributeError) as error:
                    call.replies.set_exception(error)
            start = end

    def _viewed(self, name: str, reply: Reply) -> Reply:
        view = self._client.response_callbacks.get(name)
        return reply if view is None or isinstance(reply, Exception) else view(reply)


def _is_untaught(replies: list[Reply]) -> bool:
    """True when Redis does not know a script: it was started anew."""
    return any(isinstance(reply, NoScriptError) for reply in replies)


def _pipeline(calls: list[_Call]) -> tuple[list[bytes], int]:
    """The bytes of all commands, and how many replies they have."""
    packed = [command for call in calls for command in call.packed]
    return packed, len(packed)
