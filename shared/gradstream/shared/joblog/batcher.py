"""Commands of many tasks, coalesced: what is asked within one loop tick travels as one pipeline."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import hiredis
import redis.asyncio
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gradstream.shared.joblog.lua import LuaScript

Value = str | bytes | int | float
# Its name, then its arguments.
Command = tuple[Value, ...]
# Replies are as varied as the commands; each caller knows its own. redis-py's connections have no types.
Reply = Any
_Connection = Any

_MAX_IN_FLIGHT = 4
# From the first byte sent to the last one received. A connection is broken when it takes longer, and its pipeline is sent again.
_EXCHANGE_S = 10.0
# Calls in one pipeline: the replies to all of them come when the last one is done.
_MAX_CALLS = 256


@dataclass(slots=True)
class _Call:
    commands: tuple[Command, ...]
    replies: "asyncio.Future[list[Reply]]"


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
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_scheduled = False
        # As many as pipelines were ever under way at once. The client's pool would look at each, under locks, whenever it is used.
        self._idle: list[_Connection] = []

    async def run(self, *commands: Command) -> list[Reply]:
        """The replies to commands, which reach the server in order; raises the first error among them."""
        loop = asyncio.get_running_loop()
        call = _Call(commands, loop.create_future())
        self._pending.append(call)
        self._schedule(loop)
        replies = await call.replies
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def close(self) -> None:
        """Wait for what is under way, then drop the connections."""
        while self._pending or self._tasks:
            await asyncio.sleep(0)
            if self._tasks:
                await asyncio.wait(self._tasks)
        while self._idle:
            await self._idle.pop().disconnect()

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._pending and not self._is_scheduled and len(self._tasks) < self._max_in_flight:
            self._is_scheduled = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_scheduled = False
        calls, self._pending = self._pending[: self._max_calls], self._pending[self._max_calls :]
        loop = asyncio.get_running_loop()
        task = loop.create_task(self._send(calls))
        self._tasks.add(task)
        task.add_done_callback(self._on_sent)
        self._schedule(loop)

    def _on_sent(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._schedule(task.get_loop())

    async def _send(self, calls: list[_Call]) -> None:
        try:
            replies = await self._execute(calls)
            if any(isinstance(reply, NoScriptError) for group in replies for reply in group):
                await self._load_scripts()
                replies = await self._execute(calls)
        except BaseException as error:
            for call in calls:
                if not call.replies.done():
                    call.replies.set_exception(error) if isinstance(error, Exception) else call.replies.cancel()
            if not isinstance(error, Exception):
                raise
            return
        for call, group in zip(calls, replies, strict=True):
            if not call.replies.done():
                call.replies.set_result(group)

    async def _load_scripts(self) -> None:
        commands = tuple(("SCRIPT", "LOAD", script.text) for script in self._scripts)
        await self._execute([_Call(commands, asyncio.get_running_loop().create_future())])

    async def _execute(self, calls: list[_Call]) -> list[list[Reply]]:
        """The replies to all commands of calls, sent as one; errors of Redis stand among them.

        redis-py's own pipeline does the same. It packs in Python, one argument after the other, which was a third of what a submission
        cost.
        """
        pool: Any = self._client.connection_pool
        connection: _Connection = self._idle.pop() if self._idle else pool.make_connection()

        async def on_failure(_error: Exception) -> None:
            await connection.disconnect()

        try:
            replies: list[list[Reply]] = await connection.retry.call_with_retry(
                lambda: self._exchange(connection, calls), on_failure
            )
            return replies
        finally:
            self._idle.append(connection)

    async def _exchange(self, connection: _Connection, calls: list[_Call]) -> list[list[Reply]]:
        try:
            # One for all that is sent and received; the connection's own would be one for each reply, and a task for each send.
            async with asyncio.timeout(_EXCHANGE_S):
                await connection.send_packed_command(
                    [hiredis.pack_command(command) for call in calls for command in call.commands]
                )
                return [[await self._reply(connection, command) for command in call.commands] for call in calls]
        except TimeoutError as error:
            raise RedisTimeoutError(f"no answer within {_EXCHANGE_S:.0f} s") from error

    async def _reply(self, connection: _Connection, command: Command) -> Reply:
        name = command[0]
        assert isinstance(name, str)
        try:
            return await self._client.parse_response(connection, name)
        except ResponseError as error:
            return error
