"""What can be wrong with a configuration, as sentences."""

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import msgspec


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. place: where it was written (`file.yaml:12`, `--server.seed`), or "" when it is about the whole."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


# sysexits.h: what a process ends with on a ConfigError; starting it again cannot help.
EXIT_CONFIG = 78


class ConfigError(ValueError):
    """A configuration that cannot be used; str() has one line a problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems
        super().__init__("\n".join(map(str, self.problems)))


def as_written(value: object) -> str:
    """A value as it is written in a config."""
    return '""' if value == "" else value if isinstance(value, str) else msgspec.json.encode(value).decode()


def unknown_field(name: str, known: Iterable[str]) -> str:
    """The sentence about a field that does not exist, with the nearest one that does."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "docs/config.md lists all fields"
    return f"unknown field {name!r}; {hint}"
