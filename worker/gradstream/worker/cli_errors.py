"""How a command ends when it cannot do what was asked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from gradstream.shared.config import ConfigError
from gradstream.shared.errors import GradstreamError
from gradstream.worker.inspect.place import CannotLook

EXIT_MISTAKE = 2


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
