"""How many wrong keys one address may try."""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

from gradstream.shared.clock import Clock


@dataclass(slots=True, kw_only=True)
class _Bucket:
    tokens: float
    filled_at_s: float


class FailureLimit:
    """A bucket of failures for each address: `burst` at once, then one every `refill_s`. At most max_addresses are remembered.

    Only failures are counted and only failures are refused, so a stranger behind the same proxy cannot lock a good key out.
    """

    def __init__(self, *, clock: Clock, burst: int = 20, refill_s: float = 3.0, max_addresses: int = 4096) -> None:
        self._clock = clock
        self._burst = burst
        self.refill_s = refill_s
        self._max_addresses = max_addresses
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def is_over(self, address: str) -> bool:
        """Count one failure of an address; True when it has had too many."""
        name, now_s = _network(address), self._clock.monotonic_s()
        bucket = self._buckets.setdefault(name, _Bucket(tokens=self._burst, filled_at_s=now_s))
        self._buckets.move_to_end(name)
        if len(self._buckets) > self._max_addresses:
            self._buckets.popitem(last=False)
        gained = (now_s - bucket.filled_at_s) / self.refill_s
        bucket.tokens, bucket.filled_at_s = min(self._burst, bucket.tokens + gained), now_s
        if bucket.tokens < 1:
            return True
        bucket.tokens -= 1
        return False


def _network(address: str) -> str:
    """The address, or for IPv6 the /64 around it, of which one host has all addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((parsed, 64), strict=False)) if parsed.version == 6 else address
