"""The options by which every looking tool is told which server is meant."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gradstream.shared.config import ConfigError
from gradstream.shared.errors import GradstreamError
from gradstream.worker.inspect.place import CannotLook, Place, find_place

EXIT_MISTAKE = 2

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="Config that the server was started with.", rich_help_panel="Which server"
    ),
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        metavar="URL",
        help="Its Redis; a URL with a password belongs into the config.",
        rich_help_panel="Which server",
    ),
]
DirOption = Annotated[
    Path | None,
    typer.Option(
        "--output-dir",
        metavar="DIR",
        help="Where it writes; instead of the config's output_dir.",
        rich_help_panel="Which server",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Engine name (default: the server's, else main).",
        rich_help_panel="Which server",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of tables.")]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Everything that can go wrong in a tool, as `error: ...` and status 2."""
    try:
        yield
    except GradstreamError as error:
        fail(error.message)
    except (CannotLook, ConfigError) as error:
        fail(str(error))


def place_of(config: Path | None, redis_url: str | None, output_dir: Path | None, engine: str | None) -> Place:
    """The server that the options mean; ends the command when they mean none."""
    with readable_errors():
        return find_place(config=config, redis_url=redis_url, output_dir=output_dir, engine=engine)


def fail(message: str) -> NoReturn:
    """End the command with an error."""
    for line in message.splitlines():
        sys.stderr.write(f"error: {line}\n")
    raise typer.Exit(EXIT_MISTAKE)
