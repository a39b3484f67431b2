"""The options by which every looking tool is told which server is meant."""

from pathlib import Path
from typing import Annotated

import typer

from gradstream.worker.cli_errors import readable_errors
from gradstream.worker.inspect.place import Place, find_place

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


def place_of(config: Path | None, redis_url: str | None, output_dir: Path | None, engine: str | None) -> Place:
    """The server that the options mean; ends the command when they mean none."""
    with readable_errors():
        return find_place(config=config, redis_url=redis_url, output_dir=output_dir, engine=engine)
