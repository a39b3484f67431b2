"""The long polls that wait now, and how a stopping server ends them at once."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Parked:
    """Waits of one event loop."""

    def __init__(self) -> None:
        self._scopes: set[asyncio.Timeout] = set()
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    async def wait(self, waiting: Awaitable[T]) -> T | None:
        """What waiting gives, or None when the server stops before that."""
        scope = asyncio.timeout(0 if self._is_stopping else None)
        self._scopes.add(scope)
        try:
            async with scope:
                return await waiting
        except TimeoutError:
            if not scope.expired():
                raise
            return None
        finally:
            self._scopes.discard(scope)

    def end_all(self) -> None:
        """End every wait, and those that come later."""
        self._is_stopping = True
        now_s = asyncio.get_running_loop().time()
        for scope in self._scopes:
            scope.reschedule(now_s)
