"""A budget of bytes for the request bodies in flight, shared by tenants."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gradstream.shared.errors import QueueFull
from gradstream.shared.ids import TenantId

_RETRY_AFTER_S = 1.0


class ByteBudget:
    """Counts bytes held by requests of one event loop; refuses instead of queueing, so that memory stays bounded.

    A tenant may hold as much as is free beside it: alone half of all, and with N that take what they can one part of N + 1 each. So
    however slowly some send, there is room for one more.
    """

    def __init__(self, total_bytes: int) -> None:
        self._total_bytes = total_bytes
        self._held_bytes = 0
        self._held_by: Counter[TenantId] = Counter()

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    @contextmanager
    def lease(self, tenant: TenantId) -> Iterator["Lease"]:
        """A lease that starts at nothing, grows with `take`, and gives everything back at the end."""
        lease = Lease(self, tenant)
        try:
            yield lease
        finally:
            self._give_back(tenant, lease.held_bytes)

    def add(self, tenant: TenantId, count: int) -> None:
        """Hold count more bytes for a tenant. Raises QueueFull when they do not fit."""
        held_bytes = self._held_by[tenant]
        if held_bytes + count > self._total_bytes - self._held_bytes - count:
            raise QueueFull(
                f"the bodies in flight leave no room for {count} bytes more of this tenant, which has {held_bytes} of the server's "
                f"{self._total_bytes} bytes for them; send this one again later",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._held_bytes += count
        self._held_by[tenant] += count

    def _give_back(self, tenant: TenantId, count: int) -> None:
        self._held_bytes -= count
        self._held_by[tenant] -= count
        if not self._held_by[tenant]:
            del self._held_by[tenant]


class Lease:
    """What one request holds of a ByteBudget."""

    def __init__(self, budget: ByteBudget, tenant: TenantId) -> None:
        self._budget = budget
        self._tenant = tenant
        self.held_bytes = 0

    def take(self, count: int) -> None:
        """Hold count more bytes. Raises QueueFull when they do not fit."""
        self._budget.add(self._tenant, count)
        self.held_bytes += count
