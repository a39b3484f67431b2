"""One API process: the app on uvicorn, around an open intake."""

import contextlib
import resource
import socket
from dataclasses import dataclass

import uvicorn

from gradstream.api.app import create_app
from gradstream.api.config import ApiConfig
from gradstream.api.one_write import OneWriteProtocol
from gradstream.api.parts import Parts, build_parts
from gradstream.shared.clock import SystemClock
from gradstream.shared.joblog.port import Intake

# Requests still in progress after this long are cut off when the server stops.
_STOP_WITHIN_S = 3
_BACKLOG = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the server listens; port 0 takes a free one."""

    host: str
    port: int


def listening_socket(address: Address) -> socket.socket:
    """A bound TCP socket; raises OSError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    # Accepted connections inherit this. Without it head and body of an answer wait 40 ms for each other, as asyncio leaves sockets
    # alone that were not made for TCP by name.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


class _Server(uvicorn.Server):
    """uvicorn's server, which answers the parked polls before it waits for its connections to end."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._parts.parked.end_all()
        await super().shutdown(sockets)


def server_for(intake: Intake, config: ApiConfig) -> uvicorn.Server:
    """A server that is not running yet. `await server.serve(sockets=[...])` runs it until a signal or should_exit."""
    parts = build_parts(intake, clock=SystemClock(), config=config)
    return _Server(
        uvicorn.Config(
            create_app(parts),
            loop="uvloop",
            http=OneWriteProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_STOP_WITHIN_S,
        ),
        parts,
    )


def raise_open_files_limit() -> int:
    """The number of files this process may open, after it was raised as far as allowed. Each parked poll holds one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # A hard limit of "unlimited" is refused by some kernels; then the soft one stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
