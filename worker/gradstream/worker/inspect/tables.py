"""Rich tables and the small texts in them: ages, sizes, and words of others without control characters."""

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Into a pipe or a file nothing is cut.
_PIPE_COLUMNS = 240
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console() -> Console:
    """Prints to stdout as it is given, as wide as the terminal; into a pipe wide enough for every table.

    Without emoji=False a model's `:train:` would come out as a picture.
    """
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False, markup=False, emoji=False)


def table(title: str, left: Iterable[str], right: Iterable[str] = (), last: Iterable[str] = ()) -> Table:
    """An empty table: columns of words, then columns of numbers, then columns of words again."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in left:
        made.add_column(name, overflow="fold")
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    for name in last:
        made.add_column(name, overflow="fold")
    return made


def add_row(target: Table, cells: Sequence[str], *, style: str = "") -> None:
    """A row of plain texts; what looks like markup in them is printed as it is."""
    target.add_row(*(Text(plain(cell)) for cell in cells), style=style)


def plain(text: str) -> str:
    """The text with every control character as \\xNN, so that nobody's words steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def age(seconds: float | None) -> str:
    """0.4 s, 12 s, 3.5 min, 2.1 h, 4.0 d; a dash for None."""
    if seconds is None:
        return "-"
    for limit, factor, unit in ((10, 1, "s"), (120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / factor:.0f} {unit}" if unit == "s" and limit > 10 else f"{seconds / factor:.1f} {unit}"
    return f"{seconds / 86_400:.1f} d"


def size(num_bytes: float) -> str:
    """12 B, 3.4 KiB, 1.2 GiB."""
    for unit in _UNITS:
        if num_bytes < 1024 or unit == _UNITS[-1]:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    raise AssertionError("the last unit has no limit")


def moment(at_ms: int) -> str:
    """The time of day with its date, UTC."""
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC).strftime("%Y-%m-%d %H:%M:%S")


def figure(value: float | None) -> str:
    """A number to six digits; a dash for None."""
    return "-" if value is None else f"{value:.6g}"


def write_json(value: object, *, line: bool = False) -> None:
    """value as JSON on stdout, indented, or in one line."""
    data = msgspec.json.encode(value)
    sys.stdout.write((data if line else msgspec.json.format(data, indent=2)).decode() + "\n")
    sys.stdout.flush()
