"""A budget of bytes for the request bodies in flight, shared by tenants."""

import asyncio
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gradstream.shared.errors import QueueFull
from gradstream.shared.ids import TenantId

_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """A request that waits for room; room is done when it has it."""

    tenant: TenantId
    count: int
    room: "asyncio.Future[None]"


class ByteBudget:
    """Counts bytes held by requests of one event loop, so that memory stays bounded.

    A tenant may hold as much as is free beside it: alone half of all, and with N that take what they can one part of N + 1 each. So
    however slowly some send, there is room for one more.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held_bytes = 0
        self._held_by: Counter[TenantId] = Counter()
        # In the order of arrival.
        self._waiting: list[_Waiting] = []

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def lease(self, tenant: TenantId) -> "Lease":
        """A lease that starts at nothing, grows with `take`, and gives everything back at its end."""
        return Lease(self, tenant)

    def add(self, tenant: TenantId, count: int) -> None:
        """Hold count more bytes for a tenant. Raises QueueFull when they do not fit."""
        if not self._fits(tenant, count):
            raise QueueFull(
                f"the bodies in flight leave no room for {count} bytes more of this tenant, which has {self._held_by[tenant]} of the "
                f"server's {self._total_bytes} bytes for them; send this one again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._hold(tenant, count)

    async def wait(self, tenant: TenantId, count: int, *, timeout_s: float) -> None:
        """Hold count more bytes for a tenant as soon as they fit, its requests in the order of their arrival.

        Raises QueueFull when they do not fit within timeout_s.
        """
        if self._fits(tenant, count) and all(waiting.tenant != tenant for waiting in self._waiting):
            self._hold(tenant, count)
            return
        waiting = _Waiting(tenant, count, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        try:
            async with asyncio.timeout(timeout_s):
                await waiting.room
        except TimeoutError:
            if not waiting.room.cancelled():
                return
            self.add(tenant, count)
        except asyncio.CancelledError:
            if waiting.room.done() and not waiting.room.cancelled():
                self.give_back(tenant, count)
            raise
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    def _fits(self, tenant: TenantId, count: int) -> bool:
        return self._held_by[tenant] + count <= self._total_bytes - self._held_bytes - count

    def _hold(self, tenant: TenantId, count: int) -> None:
        self._held_bytes += count
        self._held_by[tenant] += count

    def give_back(self, tenant: TenantId, count: int) -> None:
        """Hold count bytes less for a tenant."""
        self._held_bytes -= count
        self._held_by[tenant] -= count
        if not self._held_by[tenant]:
            del self._held_by[tenant]
        if self._waiting:
            self._let_in()

    def _let_in(self) -> None:
        """Give room to those who wait, of each tenant to the first ones."""
        full: set[TenantId] = set()
        for waiting in list(self._waiting):
            if waiting.tenant in full:
                continue
            if not self._fits(waiting.tenant, waiting.count):
                full.add(waiting.tenant)
                continue
            self._waiting.remove(waiting)
            if not waiting.room.done():
                self._hold(waiting.tenant, waiting.count)
                waiting.room.set_result(None)


class Lease(AbstractContextManager["Lease"]):
    """What one request holds of a ByteBudget, until `end` or the end of its context."""

    def __init__(self, budget: ByteBudget, tenant: TenantId) -> None:
        self._budget = budget
        self._tenant = tenant
        self.held_bytes = 0

    def __exit__(self, *_error: object) -> None:
        self.end()

    def end(self) -> None:
        """Give everything back."""
        held_bytes, self.held_bytes = self.held_bytes, 0
        self._budget.give_back(self._tenant, held_bytes)

    def take(self, count: int) -> None:
        """Hold count more bytes. Raises QueueFull when they do not fit."""
        self._budget.add(self._tenant, count)
        self.held_bytes += count

    async def wait(self, count: int, *, timeout_s: float) -> None:
        """Hold count more bytes as soon as they fit. Raises QueueFull when they do not within timeout_s."""
        await self._budget.wait(self._tenant, count, timeout_s=timeout_s)
        self.held_bytes += count
