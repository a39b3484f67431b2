"""Connections of the batcher that break, stall or say odd things. The servers here speak the protocol and do as each test says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import hiredis
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from gradstream.shared.joblog import batcher
from gradstream.shared.joblog.client import async_client

_DEADLINE_S = 60.0
# What becomes of one command: bytes to answer, or None to hang up.
Answers = Iterator[bytes | None]


class Server:
    """Answers the commands of the batcher by a list, whatever they are; the login of redis-py is answered by itself."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.num_connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.received: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.writers.append(writer)
        parser = hiredis.Reader()
        while data := await reader.read(65536):
            parser.feed(data)
            while (command := parser.gets()) is not False:
                if command[0] in (b"CLIENT", b"SELECT", b"AUTH", b"PING"):
                    writer.write(b"+OK\r\n")
                    continue
                self.received.append(command[-1])
                answer = next(self._answers)
                if answer is None:
                    writer.close()
                    return
                for part in answer.split(b"|"):
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0)
        writer.close()


@asynccontextmanager
async def served(
    *answers: bytes | None, num_retries: int = 0, **limits: int
) -> AsyncIterator[tuple[Server, batcher.CommandBatcher]]:
    server = Server(iter(answers))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    client = async_client(
        f"redis://127.0.0.1:{port}", max_connections=1, num_retries=num_retries, socket_timeout_s=None
    )
    commands = batcher.CommandBatcher(client, [], **limits)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            yield server, commands
            await commands.close()
    finally:
        await client.aclose()
        listening.close()


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():  # noqa: ASYNC110  the batcher tells nobody
        await asyncio.sleep(0.01)


async def test_a_pipeline_is_sent_again_when_its_connection_breaks() -> None:
    async with served(b"+one\r\n", None, b"+two\r\n", b"+three\r\n", num_retries=1) as (server, commands):
        assert await commands.run(("GET", "a")) == [b"one"]
        assert await commands.run(("GET", "b"), ("GET", "c")) == [b"two", b"three"]
        assert server.received == [b"a", b"b", b"b", b"c"]
        assert server.num_connections == 2


async def test_a_broken_connection_without_retries_is_its_callers_error_and_the_next_call_has_another() -> None:
    async with served(b"+one\r\n", None, b"+two\r\n") as (_, commands):
        await commands.run(("GET", "a"))
        with pytest.raises(RedisConnectionError):
            await commands.run(("GET", "b"))
        assert await commands.run(("GET", "c")) == [b"two"]


async def test_a_connection_that_was_closed_while_nobody_used_it_costs_no_retry() -> None:
    async with served(b"+one\r\n", b"+two\r\n", num_retries=0) as (server, commands):
        await commands.run(("GET", "a"))
        server.writers[0].close()
        await until(lambda: not commands._idle[0].is_open)
        assert await commands.run(("GET", "b")) == [b"two"]
        assert server.num_connections == 2


async def test_a_server_that_is_loading_is_asked_again() -> None:
    loading = b"-LOADING Redis is loading the dataset in memory\r\n"
    async with served(b"+one\r\n", loading, b"+two\r\n", num_retries=1) as (_, commands):
        await commands.run(("GET", "a"))
        assert await commands.run(("GET", "b")) == [b"two"]


async def test_a_server_that_stops_answering_is_given_up_and_the_next_call_has_another_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of the first connection alone, and long enough for the login and an answer on a machine that is busy.
    monkeypatch.setattr(batcher, "_EXCHANGE_S", 2.0)
    async with served(b"+one\r\n", b"", b"+two\r\n") as (server, commands):
        await commands.run(("GET", "a"))
        monkeypatch.undo()
        with pytest.raises(RedisTimeoutError):
            await commands.run(("GET", "b"))
        assert await commands.run(("GET", "c")) == [b"two"]
        assert server.num_connections == 2


async def test_an_error_is_raised_to_the_caller_whose_command_it_answers_alone() -> None:
    answers = (b"+one\r\n", b"+two\r\n", b"-ERR wrong kind\r\n", b"$4\r|\nfo|ur\r\n")
    async with served(*answers, max_in_flight=1) as (server, commands):
        await commands.run(("GET", "a"))
        two, error, four = await asyncio.gather(
            *(commands.run(("GET", name)) for name in "bcd"), return_exceptions=True
        )
        assert two == [b"two"]
        assert isinstance(error, ResponseError)
        assert four == [b"four"]
        assert server.num_connections == 1


async def test_bytes_that_are_no_answer_end_the_connection() -> None:
    async with served(b"+one\r\n", b"HTTP/1.1 400\r\n", b"+two\r\n", num_retries=1) as (server, commands):
        await commands.run(("GET", "a"))
        assert await commands.run(("GET", "b")) == [b"two"]
        assert server.num_connections == 2


async def test_a_command_that_cannot_be_written_is_the_error_of_its_caller_alone() -> None:
    async with served(b"+one\r\n", b"+two\r\n", b"+three\r\n") as (server, commands):
        await commands.run(("GET", "a"))
        two, text, nothing, three = await asyncio.gather(
            commands.run(("GET", "b")),
            commands.run(("GET", "\ud800")),
            commands.run(("GET", None)),  # type: ignore[arg-type]  what is under test
            commands.run(("GET", "c")),
            return_exceptions=True,
        )
        assert (two, three) == ([b"two"], [b"three"])
        assert isinstance(text, UnicodeEncodeError)
        assert isinstance(nothing, TypeError)
        assert server.received == [b"a", b"b", b"c"]


async def test_a_connection_that_cannot_even_be_made_is_an_error_and_holds_up_nothing() -> None:
    client = async_client(
        "rediss://127.0.0.1:1?ssl_cert_reqs=bogus", max_connections=1, num_retries=0, socket_timeout_s=None
    )
    commands = batcher.CommandBatcher(client, [], max_in_flight=1)
    async with asyncio.timeout(_DEADLINE_S):
        for _ in range(3):
            with pytest.raises(RedisError, match="bogus"):
                await commands.run(("GET", "a"))
        await commands.close()
    await client.aclose()


async def test_nothing_to_ask_has_no_answers() -> None:
    async with served() as (server, commands):
        assert await commands.run() == []
        assert server.num_connections == 0


async def test_an_answer_too_many_ends_the_connection() -> None:
    async with served(b"+one\r\n", b"+two\r\n+stray\r\n", b"+two\r\n", num_retries=1) as (server, commands):
        await commands.run(("GET", "a"))
        assert await commands.run(("GET", "b")) == [b"two"]
        assert server.num_connections == 2


async def test_a_reply_of_an_unknown_shape_is_the_error_of_its_caller_alone() -> None:
    async with served(b"+one\r\n", b":5\r\n", b"+two\r\n") as (server, commands):
        await commands.run(("GET", "a"))
        odd, two = await asyncio.gather(
            commands.run(("HGETALL", "b")), commands.run(("GET", "c")), return_exceptions=True
        )
        assert isinstance(odd, TypeError)
        assert two == [b"two"]
        assert server.num_connections == 1


async def test_no_more_pipelines_are_under_way_than_may_be() -> None:
    async with served(*[b"+ok\r\n"] * 40, max_in_flight=2, max_calls=4) as (server, commands):
        replies = await asyncio.gather(*(commands.run(("GET", str(n))) for n in range(40)))
        assert replies == [[b"ok"]] * 40
        assert server.num_connections == 2
        assert sorted(server.received, key=int) == [str(n).encode() for n in range(40)]
