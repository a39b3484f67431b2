"""A named table of implementations, filled by one file each."""

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterator
from types import ModuleType
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Registry(Generic[K, V]):
    """Entries by key, in registration order. `what` names the kind of entry in messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[K, V] = {}

    def register(self, key: K) -> Callable[[V], V]:
        """A decorator that enters a value under key; a second one under the same key raises ValueError."""

        def enter(value: V) -> V:
            if key in self._entries:
                raise ValueError(f"{self._what} {key!r} is registered twice")
            self._entries[key] = value
            return value

        return enter

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def __getitem__(self, key: K) -> V:
        return self._entries[key]

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def values(self) -> list[V]:
        return list(self._entries.values())


def import_siblings(package: ModuleType) -> None:
    """Import every module of a package in name order, so that each registers its entry."""
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        importlib.import_module(f"{package.__name__}.{info.name}")
