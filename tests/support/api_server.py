"""The real API on a real socket and the real Redis, in a thread of the test process."""

import contextlib
import threading
from collections.abc import Iterator

import httpx
import uvloop

from gradstream.api.config import ApiConfig
from gradstream.api.serve import Address, listening_socket, server_for
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.redis_intake import RedisIntake

_DEADLINE_S = 60.0


@contextlib.contextmanager
def api_server(url: str, *, engine: str, config: ApiConfig, limits: Limits) -> Iterator[str]:
    """The base URL of a running server."""
    sock = listening_socket(Address(host="127.0.0.1", port=0))
    base_url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    started, servers, errors = threading.Event(), [], []

    async def main() -> None:
        async with RedisIntake(url, engine=engine, limits=limits) as intake:
            server = server_for(intake, config)
            servers.append(server)
            started.set()
            await server.serve(sockets=[sock])

    def run() -> None:
        try:
            uvloop.run(main())
        except BaseException as error:  # noqa: BLE001  handed to the test
            errors.append(error)
            started.set()

    # A daemon: a test process never waits at its end for a server that did not stop.
    thread = threading.Thread(target=run, name="api-server", daemon=True)
    thread.start()
    try:
        assert started.wait(_DEADLINE_S)
        assert not errors, errors
        _wait_for_port(base_url)
        yield base_url
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(_DEADLINE_S)
        sock.close()
    assert not errors, errors
    assert not thread.is_alive()


def _wait_for_port(base_url: str) -> None:
    """Return once the server answers; the connection itself waits in the socket's backlog."""
    httpx.get(f"{base_url}/api/v1/healthz", timeout=_DEADLINE_S)
