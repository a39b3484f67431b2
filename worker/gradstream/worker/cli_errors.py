"""How a command ends when it cannot do what was asked."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol, runtime_checkable

import typer

from gradstream.shared.config import ConfigError
from gradstream.shared.errors import GradstreamError
from gradstream.worker.inspect.place import CannotLook

EXIT_MISTAKE = 2


@runtime_checkable
class _UsageError(Protocol):
    """What typer raises for a command line that it cannot read."""

    exit_code: int

    def format_message(self) -> str: ...


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None, *, prog_name: str | None = None) -> NoReturn:
    """Run a command line (None: the process's own) to the end of the process; a mistake in it is `error: ...` in one line and status 2."""
    try:
        code = app(arguments, prog_name=prog_name, standalone_mode=False)
    except typer.Abort:
        sys.stderr.write("aborted\n")
        sys.exit(1)
    except Exception as error:
        if not isinstance(error, _UsageError):
            raise
        _say_usage(error)
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _say_usage(error: _UsageError) -> None:
    message = error.format_message()
    if "\n" in message.strip() or not message.strip():
        # A group without a command: its help, which typer may have printed already.
        sys.stderr.write(message)
        return
    context = getattr(error, "ctx", None)
    where = "" if context is None else f"; see `{context.command_path} --help`"
    sys.stderr.write(f"error: {message.strip().rstrip('.?')}{where}\n")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Everything that can go wrong in a tool, as `error: ...` and status 2."""
    try:
        yield
    except GradstreamError as error:
        fail(error.message)
    except (CannotLook, ConfigError) as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """End the command with an error."""
    for line in message.splitlines():
        sys.stderr.write(f"error: {line}\n")
    raise typer.Exit(EXIT_MISTAKE)
