"""What the launcher says to whoever started it. Nobody has to be able to hear it."""

import io
import sys
from contextlib import suppress
from typing import TextIO, cast

from rich.console import Console


class Heedless(io.TextIOBase):
    """A text stream that drops what the stream below cannot take: a full disk, a closed terminal, a pipe that nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding or "utf-8"

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def console() -> Console:
    """A console on standard output that never raises because of it.

    Without emoji=False a model's `:train:` would come out as a picture.
    """
    return Console(file=cast("TextIO", Heedless(sys.stdout)), soft_wrap=True, emoji=False)
