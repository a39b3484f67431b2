"""What the launcher can see of a gang from outside: who leads, and whether batches get done."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Self, cast

import msgspec

from gradstream.shared.catalog import EngineCard
from gradstream.shared.clock import Clock
from gradstream.shared.config.agreement import Terms, decode_terms, encode_terms
from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog import lua
from gradstream.shared.joblog.client import redis_errors, sync_client
from gradstream.shared.joblog.keys import Keys

_CARD = msgspec.json.Decoder(EngineCard)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One look. epoch: of the newest gang. card_epoch: of the last gang that was ready.
    lease_owner: the launcher whose gang leads now, or who started it by hand. last_batch: journal id of the last commit.
    has_terms: what publish told is there."""

    epoch: int = 0
    card_epoch: int = 0
    lease_owner: str = ""
    last_batch: str = ""
    has_terms: bool = False

    @property
    def is_led(self) -> bool:
        """True when a gang holds the lease and is ready."""
        return bool(self.lease_owner) and self.card_epoch == self.epoch


class Leaderless:
    """Tells when nobody has held the lease for limit_s although a gang runs that should."""

    def __init__(self, *, limit_s: float, clock: Clock) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._since_s: float | None = None

    def is_overdue(self, sight: Sight | None, *, should_lead: bool) -> bool:
        """Take in one look. should_lead: a gang runs that had the lease.

        A Redis that was away begins a new count: the gang could not renew its lease there.
        """
        if sight is None or sight.lease_owner or not should_lead:
            self._since_s = None
            return False
        now_s = self._clock.monotonic_s()
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= self._limit_s


class EngineWatch:
    """Reads an engine's state in Redis; it writes the end of a dead gang's lease, and the server's terms."""

    def __init__(self, url: str, *, engine: str) -> None:
        self._keys = Keys(engine)
        self._client = sync_client(url, num_retries=0)
        self._lease = self._client.register_script(lua.load("lease").text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def clear_lease(self, owner: str) -> None:
        """End the owner's lease because its gang is known to be dead; without Redis it ends by itself, later."""
        with suppress(Unavailable), redis_errors():
            self._lease(keys=[self._keys.log], args=[self._keys.prefix, "clear", owner, 0, 0])

    def publish(self, terms: Terms) -> None:
        """Tell gangs that are started by hand what they must agree to. Raises Unavailable."""
        with redis_errors():
            self._client.set(self._keys.terms, encode_terms(terms))

    def terms(self) -> Terms | None:
        """What publish told last, None when there is nothing. Raises Unavailable."""
        with redis_errors():
            data = cast("bytes | None", self._client.get(self._keys.terms))
        return None if data is None else decode_terms(data)

    def look(self) -> Sight | None:
        """The engine as it is now, None while Redis cannot be asked."""
        try:
            with redis_errors():
                names = (self._keys.epoch, self._keys.card, self._keys.lease, self._keys.terms)
                epoch, card, lease, terms = cast("list[bytes | None]", self._client.mget(names))
                last_batch = cast("bytes | None", self._client.hget(self._keys.stat, "journal"))
        except Unavailable:
            return None
        return Sight(
            epoch=int(epoch or 0),
            card_epoch=_CARD.decode(card).epoch if card else 0,
            lease_owner=(lease or b"").decode(),
            last_batch=(last_batch or b"").decode(),
            has_terms=terms is not None,
        )
