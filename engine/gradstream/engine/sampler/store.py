"""The frozen adapters that samplers use: in memory as far as they fit, else on disk."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from gradstream.engine.adapters.adapter import FrozenAdapter
from gradstream.shared.errors import UnknownModel
from gradstream.shared.ids import TenantId

# Adapters in memory at most, but for the newest one; a larger client's adapter takes the place of several small ones.
MAX_RESIDENT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One adapter in memory, and whose it is."""

    adapter: FrozenAdapter
    tenant: TenantId

    @property
    def size_bytes(self) -> int:
        return self.adapter.weights.nbytes


@dataclass(slots=True, kw_only=True)
class SamplerStore:
    """Adapters by URI, the least recently used one first. The same on every rank: all of them make the same calls."""

    max_bytes: int = MAX_RESIDENT_BYTES
    _residents: OrderedDict[str, Resident] = field(default_factory=OrderedDict)

    def put(self, uri: str, resident: Resident) -> None:
        """Keep an adapter, and let go of the least recently used others that it leaves no room for."""
        self._residents.pop(uri, None)
        self._residents[uri] = resident
        total = sum(one.size_bytes for one in self._residents.values())
        while total > self.max_bytes and len(self._residents) > 1:
            _, dropped = self._residents.popitem(last=False)
            total -= dropped.size_bytes

    def get(self, uri: str, tenant: TenantId) -> FrozenAdapter | None:
        """The adapter if it is in memory; raises UnknownModel when it is another tenant's."""
        resident = self._residents.get(uri)
        if resident is None:
            return None
        if resident.tenant != tenant:
            raise UnknownModel(f"there is no checkpoint {uri}")
        self._residents.move_to_end(uri)
        return resident.adapter

    def keep(self, is_kept: Callable[[FrozenAdapter], bool]) -> None:
        """Let go of the others, which come back from disk when they are asked for."""
        self._residents = OrderedDict((uri, one) for uri, one in self._residents.items() if is_kept(one.adapter))

    def has_other(self, is_kept: Callable[[FrozenAdapter], bool]) -> bool:
        """True when `keep` would let go of one."""
        return not all(is_kept(one.adapter) for one in self._residents.values())

    def drop(self, uri: str) -> None:
        """Forget an adapter whose checkpoint was replaced or removed."""
        self._residents.pop(uri, None)
