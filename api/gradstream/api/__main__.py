"""The API process.

    python -m gradstream.api --settings FILE [--host HOST] [--port PORT]

It keeps nothing that another one would need, so any number of them may serve one queue (docs/multinode.md).
Exit status: 0 stopped as asked, 78 the configuration cannot be served (one sentence on stderr), 1 anything else.
"""

import argparse
import gc
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog
import uvloop

from gradstream.api.config import api_config
from gradstream.api.serve import Address, listening_socket, raise_open_files_limit, server_for
from gradstream.shared.allocator import keep_freed_memory
from gradstream.shared.config import EXIT_CONFIG, ConfigError, Settings, read_handover
from gradstream.shared.config.access import access_problems
from gradstream.shared.joblog.limits import limits_of
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.keys import KeyFileError, read_keys
from gradstream.shared.telemetry.log import setup_logging

# Each parked poll and each connection holds a file; below this, a busy server runs out of them.
_FEW_FILES = 4096
_MAX_PORT = 65535
# How long a thread that works on a large body may keep the interpreter from the event loop, where the interpreter has the choice.
_SWITCH_S = 0.0005

_log = structlog.get_logger(__name__)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m gradstream.api", description=__doc__)
    parser.add_argument("--settings", type=Path, required=True, help="resolved settings, as the launcher writes them")
    parser.add_argument("--host", help="listen here instead of at the settings' api_host")
    parser.add_argument(
        "--port", type=_port, help="listen there instead of at the settings' api_port; 0 takes a free one"
    )
    arguments = parser.parse_args()
    try:
        settings = _read(arguments.settings, host=arguments.host, port=arguments.port)
    except ConfigError as error:
        _exit_config(str(error))
    keep_freed_memory()
    sys.setswitchinterval(_SWITCH_S)
    setup_logging(process="api", level=settings.log_level)
    _check_keys(settings)
    max_files = raise_open_files_limit()
    if max_files < _FEW_FILES:
        _log.warning("few_open_files_allowed", max_files=max_files, wanted=_FEW_FILES)
    address = Address(host=settings.api_host, port=settings.api_port)
    try:
        sock = listening_socket(address)
    except OSError as error:
        _exit_config(f"api_host {address.host}, api_port {address.port}: cannot listen there ({error.strerror})")
    with sock:
        uvloop.run(_serve(settings, sock))


def _port(text: str) -> int:
    """A TCP port; argparse turns the ValueError into a sentence."""
    port = int(text)
    if not 0 <= port <= _MAX_PORT:
        raise ValueError(text)
    return port


def _read(path: Path, *, host: str | None, port: int | None) -> Settings:
    """The settings in a file, with another address if one is given. Raises ConfigError, also for one that lets the wrong people in."""
    settings = read_handover(path)
    if host is not None:
        settings = msgspec.structs.replace(settings, api_host=host)
        if problems := access_problems(settings):
            raise ConfigError(problems)
    return settings if port is None else msgspec.structs.replace(settings, api_port=port)


async def _serve(settings: Settings, sock: socket.socket) -> None:
    assert settings.redis_url is not None, "the launcher resolves redis_url"
    async with RedisIntake(settings.redis_url, engine=settings.engine_name, limits=limits_of(settings)) as intake:
        server = server_for(intake, api_config(settings))
        _set_aside()

        def stop(_number: int, _frame: object) -> None:
            server.should_exit = True

        # uvicorn puts its own handlers in front and calls these again when it is done, so that a stop ends with status 0.
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        _log.info("api_listening", host=settings.api_host, port=sock.getsockname()[1])
        await server.serve(sockets=[sock])


def _set_aside() -> None:
    """Take what is there now, and stays, out of the garbage collector's rounds.

    A round through all of it, 100,000 objects of modules and routes, would hold up every request for tens of milliseconds, the more
    often the more jobs wait.
    """
    gc.collect()
    gc.freeze()


def _check_keys(settings: Settings) -> None:
    """End here when the key file cannot be used, rather than turn everybody away later."""
    if settings.api_keys_file is None:
        return
    try:
        read_keys(Path(settings.api_keys_file))
    except FileNotFoundError:
        _exit_config(f"api_keys_file: {settings.api_keys_file} is not there; make it with `gradstream keys add`")
    except KeyFileError as error:
        _exit_config(f"api_keys_file: {error}")


def _exit_config(sentence: str) -> NoReturn:
    sys.stderr.write(f"{sentence}\n")
    raise SystemExit(EXIT_CONFIG)


if __name__ == "__main__":
    main()
