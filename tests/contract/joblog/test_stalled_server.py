"""A server that accepts commands and answers some of them never."""

import asyncio
from collections.abc import Sequence

import hiredis
import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError

from gradstream.shared.joblog import batcher, lua
from gradstream.shared.joblog.client import async_client

_DEADLINE_S = 60.0


def _answer(command: Sequence[bytes]) -> bytes:
    match [part.upper() for part in command[:2]]:
        case [b"EVALSHA", *_]:
            return b"-NOSCRIPT No matching script.\r\n"
        case [b"SCRIPT", b"LOAD"]:
            return b""
    return b"+OK\r\n"


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    parser = hiredis.Reader()
    while data := await reader.read(65536):
        parser.feed(data)
        while (command := parser.gets()) is not False:
            writer.write(_answer(command))
    writer.close()


async def test_a_server_that_stalls_while_it_is_given_the_scripts_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batcher, "_EXCHANGE_S", 0.2)
    server = await asyncio.start_server(_serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = async_client(f"redis://127.0.0.1:{port}", max_connections=1, num_retries=0, socket_timeout_s=None)
    script = lua.load("delivered")
    commands = batcher.CommandBatcher(client, [script])
    try:
        async with asyncio.timeout(_DEADLINE_S):
            with pytest.raises(RedisTimeoutError):
                await commands.run(("EVALSHA", script.sha, 0))
            await commands.close()
    finally:
        await client.aclose()
        server.close()
