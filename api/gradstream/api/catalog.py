"""What the running engine offers, as its card says, cached for a moment."""

from gradstream.shared.catalog import EngineCard, LossCard
from gradstream.shared.clock import Clock
from gradstream.shared.errors import InvalidRequest, Unavailable, Unsupported
from gradstream.shared.joblog.port import Intake


class Catalog:
    """The engine's card. At most ttl_s old: a new gang publishes a new one."""

    def __init__(self, intake: Intake, *, clock: Clock, ttl_s: float) -> None:
        self._intake = intake
        self._clock = clock
        self._ttl_s = ttl_s
        self._card: EngineCard | None = None
        self._read_at_s = 0.0

    async def card(self) -> EngineCard:
        """The card; raises Unavailable before the first worker was ready."""
        now_s = self._clock.monotonic_s()
        if self._card is None or now_s - self._read_at_s >= self._ttl_s:
            self._card = await self._intake.card()
            self._read_at_s = now_s
        if self._card is None:
            raise Unavailable("no worker has been ready yet; the model is still loading, ask again in a few seconds")
        return self._card


def check_base_model(card: EngineCard, name: str, *, field: str = "base_model") -> None:
    """Raise InvalidRequest unless the name is one of the card's."""
    if name not in card.names():
        raise InvalidRequest(f"{field}: this server does not serve {name!r}; it serves {', '.join(card.names())}")


def base_model_name(card: EngineCard, asked: str | None, *, saved: str | None) -> str:
    """What to call the base model: as the client asked, else as the checkpoint says, else by its main name.

    Raises InvalidRequest for a name that was asked for and is not served. A checkpoint may have been saved under a name that is no
    longer given; whether it fits the base model is for the engine to say.
    """
    if asked is not None:
        check_base_model(card, asked)
        return asked
    return saved if saved in card.names() else card.model_name


def loss_card(card: EngineCard, name: str) -> LossCard:
    """The card of the named loss.

    Raises Unsupported for one that is known and not had, with the engine's reason; InvalidRequest with the names there are otherwise.
    """
    refusal = card.refused_losses.get(name)
    if refusal is not None:
        raise Unsupported(refusal)
    for loss in card.losses:
        if loss.name == name:
            return loss
    raise InvalidRequest(
        f"loss_fn: {name!r} is not offered here; choose one of {', '.join(x.name for x in card.losses)}"
    )
