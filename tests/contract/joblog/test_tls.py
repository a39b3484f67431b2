"""The job log over TLS and with a password, as a Redis on another machine is reached."""

import asyncio
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis
import trustme
from tests.support.joblog_bench import Bench
from tests.support.redis_server import running_server

from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.redis_intake import RedisIntake

_PASSWORD = "correct-horse"  # noqa: S105  of a server that lives as long as a test


@asynccontextmanager
async def tls_in_front_of(url: str, context: ssl.SSLContext) -> AsyncIterator[int]:
    """The port of a proxy that speaks TLS to clients, and plainly to the server at url."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_unix_connection(url.removeprefix("unix://").partition("?")[0])
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as proxy:
        yield proxy.sockets[0].getsockname()[1]


@pytest.fixture
def authority(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's side of TLS for localhost, and the file of the authority that clients are to trust."""
    own, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.issue_cert("localhost").configure_cert(context)
    own.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return context, tmp_path / "ca.pem"


@asynccontextmanager
async def guarded(authority: tuple[ssl.SSLContext, Path], engine_name: str) -> AsyncIterator[tuple[Bench, str]]:
    """A server with a password, and the URL at which it is reached through TLS, where the password is still missing."""
    context, trusted = authority
    with running_server() as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.config_set("requirepass", _PASSWORD)
        own_url = server.url.replace("unix://", f"unix://:{_PASSWORD}@")
        async with (
            tls_in_front_of(server.url, context) as port,
            Bench.running(own_url, engine_name, Limits()) as bench,
        ):
            yield bench, f"rediss://PASSWORDlocalhost:{port}?ssl_ca_certs={trusted}"


async def test_small_and_large_jobs_go_through_tls_with_a_password(
    authority: tuple[ssl.SSLContext, Path], engine_name: str
) -> None:
    large = random.Random(0).randbytes(300_000)
    async with guarded(authority, engine_name) as (bench, url):
        await bench.create()
        await bench.ready()
        async with RedisIntake(url.replace("PASSWORD", f":{_PASSWORD}@"), engine=engine_name) as intake:
            direct, bench.intake = bench.intake, intake
            await bench.submit(1)
            await bench.submit(2, large)
            bench.intake = direct
        assert [entry.job.payload for entry in bench.log()][1:] == [b"payload", large]


async def test_a_missing_password_is_told_and_writes_nothing(
    authority: tuple[ssl.SSLContext, Path], engine_name: str
) -> None:
    async with guarded(authority, engine_name) as (bench, url):
        await bench.create()
        await bench.ready()
        async with RedisIntake(url.replace("PASSWORD", ""), engine=engine_name) as intake:
            direct, bench.intake = bench.intake, intake
            with pytest.raises(Unavailable, match="uthentication required"):
                await bench.submit(1)
            bench.intake = direct
        assert bench.seqs() == [0]
