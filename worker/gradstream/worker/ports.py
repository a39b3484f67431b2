"""The port of the API: the one that was asked for, or else one that is free."""

import errno
import os
import socket
from contextlib import suppress

import msgspec

from gradstream.shared.config import Settings

# How many ports above the usual one are tried before any free one is taken: a client's user may remember a near one.
_NUM_NEAR = 20


class PortTaken(Exception):
    """The address that was asked for cannot be listened on; str() says why and what to do."""


def with_free_port(settings: Settings) -> tuple[Settings, str | None]:
    """The settings with a port that can be listened on now, and what to say when it is not the usual one.

    Only a port that nobody asked for is exchanged. Raises PortTaken.
    """
    host, port = settings.api_host, settings.api_port
    try:
        _listen(host, port)
    except OSError as error:
        if "api_port" in settings.explicit or error.errno != errno.EADDRINUSE:
            advice = "stop what listens there, or choose another one with --api-port N"
            # strerror of `create_server` names the address once more.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise PortTaken(f"api_host {host}, api_port {port}: cannot listen there ({reason}); {advice}") from error
    else:
        return settings, None
    free = _free_port(host, above=port)
    warning = (
        f"PORT {port} IS TAKEN by another program: this server listens on PORT {free} instead. "
        f"Clients must be told so; --api-port N chooses one for good."
    )
    return msgspec.structs.replace(settings, api_port=free), warning


def _free_port(host: str, *, above: int) -> int:
    for port in range(above + 1, min(above + _NUM_NEAR, 65535) + 1):
        with suppress(OSError):
            return _listen(host, port)
    return _listen(host, 0)


def _listen(host: str, port: int) -> int:
    """The port that was listened on for a moment. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as server:
        return int(server.getsockname()[1])
