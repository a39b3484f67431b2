"""Where the server lies that a tool is asked about: its Redis, its files and the name of its engine."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import redis

from gradstream.shared.config import ConfigError, Problem, Settings, load_settings, read_handover
from gradstream.shared.embedded.binary import NoServerBinary
from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.paths import DataDirInUse, socket_path
from gradstream.shared.embedded.server import EmbeddedServer, ServerDidNotStart
from gradstream.shared.joblog.client import sync_client
from gradstream.shared.joblog.limits import Limits, limits_of
from gradstream.worker.directories import joblog_dir, snapshots_dir
from gradstream.worker.run_dir import RunDir

DEFAULT_ENGINE = "main"
# What a server makes in its output directory, or a tool for it.
_OF_A_SERVER = ("run", "logs", "redis", "joblog", "snapshots", "checkpoints", "samplers", "dead", "exports")
_MAX_NAMED = 8


class CannotLook(Exception):
    """There is nothing to look at, or it cannot be reached; str() says what to give or to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A server, running or not. redis_url: given, or of a running server; None when only the data of an embedded one may be there."""

    engine: str
    limits: Limits
    output_dir: Path | None = None
    redis_url: str | None = None
    embedded: EmbeddedConfig | None = None

    @property
    def directory(self) -> Path:
        """The output directory. Raises CannotLook when none was named."""
        if self.output_dir is None:
            raise CannotLook("--redis-url: says nothing of files; give --config FILE or --output-dir DIR")
        return self.output_dir

    @property
    def joblog_dir(self) -> Path:
        """Where the engine's job log is on disk."""
        return joblog_dir(self.directory, self.engine)

    @property
    def snapshots_dir(self) -> Path:
        """Where the engine's snapshots are."""
        return snapshots_dir(self.directory, self.engine)


def find_place(
    *,
    config: Path | None = None,
    redis_url: str | None = None,
    output_dir: Path | None = None,
    engine: str | None = None,
) -> Place:
    """The server that these options mean. Raises CannotLook or ConfigError.

    What a running server was started with, which it notes in its output_dir, comes before what a config file says.
    """
    if config is None and redis_url is None and output_dir is None:
        raise CannotLook(
            "give --config FILE (what the server was started with), --output-dir DIR (where it writes) or --redis-url URL"
        )
    settings = None if config is None else load_settings(config)
    directory = output_dir or (None if settings is None else Path(settings.output_dir))
    directory = None if directory is None else directory.expanduser().resolve()
    if directory is not None and not directory.is_dir():
        raise CannotLook(f"{directory}: there is no such directory; no server has run with it as output_dir")
    if directory is not None and not any((directory / name).exists() for name in _OF_A_SERVER):
        raise CannotLook(
            f"{directory}: is no output_dir of a server; one holds redis, joblog or snapshots, and here is {_held(directory)}"
        )
    noted = None if directory is None else _noted(directory)
    known = noted or settings
    return Place(
        engine=engine or (DEFAULT_ENGINE if known is None else known.engine_name),
        limits=Limits() if known is None else limits_of(known),
        output_dir=directory,
        redis_url=redis_url or (None if known is None else known.redis_url),
        embedded=_embedded(directory, known),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A Redis that answers. is_served False: no server runs, and what it says of a gang is of one that is dead."""

    url: str
    is_served: bool


@contextmanager
def reachable_redis(place: Place) -> Iterator[Reached]:
    """The server's Redis. The data of an embedded one that does not run is served for the duration of the block.

    Raises CannotLook.
    """
    if place.redis_url is not None and _answers(place.redis_url):
        yield Reached(url=place.redis_url, is_served=True)
        return
    if place.embedded is None or not place.embedded.data_dir.is_dir():
        where = "its Redis" if place.redis_url is None else _without_password(place.redis_url)
        raise CannotLook(f"{where} cannot be reached; start the server, or give the --redis-url of one that runs")
    try:
        with EmbeddedServer(place.embedded) as server:
            sys.stderr.write(f"no server runs there; its queue is read from {place.embedded.data_dir}\n")
            yield Reached(url=server.url, is_served=False)
    except (DataDirInUse, NoServerBinary, ServerDidNotStart) as error:
        raise CannotLook(str(error)) from error


def names_of(found: Sequence[str]) -> str:
    """Some of the names that exist, for a message; `nothing` when there are none."""
    if not found:
        return "nothing"
    more = len(found) - _MAX_NAMED
    return ", ".join(found[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def engines_in(parent: Path) -> list[str]:
    """The engines that have a directory below parent, be it of logs or of snapshots."""
    return sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _held(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    return names_of(names)


def _noted(output_dir: Path) -> Settings | None:
    """The settings of the server that runs in output_dir, or was killed there; None when it stopped in order."""
    path = RunDir(output_dir).settings_file
    try:
        return read_handover(path) if path.exists() else None
    except PermissionError as error:
        raise CannotLook(f"{path}: cannot be read: {error.strerror}; it belongs to who started the server") from error


def _embedded(output_dir: Path | None, settings: Settings | None) -> EmbeddedConfig | None:
    """How the embedded server of an output_dir is started; None when there can be none."""
    if output_dir is None:
        return None
    if settings is None:
        return EmbeddedConfig(data_dir=output_dir / "redis")
    data_dir = Path(settings.redis_data_dir or output_dir / "redis")
    if settings.redis_url is not None and settings.redis_url != _unix_url(data_dir):
        return None
    return EmbeddedConfig(
        data_dir=data_dir,
        durability=settings.durability,
        max_memory_bytes=settings.redis_memory_limit,
        binary=Path(settings.redis_binary) if settings.redis_binary else None,
        stop_timeout_s=settings.stop_timeout_s,
    )


def _unix_url(data_dir: Path) -> str:
    """How the embedded server of this directory is reached."""
    return f"unix://{quote(str(socket_path(data_dir)))}"


def _answers(url: str) -> bool:
    try:
        client = sync_client(url, num_retries=0)
    except ValueError as error:
        raise ConfigError([Problem("--redis-url", f"{_without_password(url)}: {error}")]) from error
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False
    finally:
        client.close()


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
