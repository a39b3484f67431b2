"""Parameters of losses as xorl clients write them, and as the engine's losses take them."""

from collections.abc import Mapping
from dataclasses import dataclass

from gradstream.api.catalog import loss_card
from gradstream.shared.catalog import EngineCard, LossCard
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.hyperparameters import check_fits

DEFAULT_LOSS = "causallm_loss"
# The loss that clients ask for with the parameters of another one, as those documents show it.
_CLIP_PARAMS = frozenset({"eps_clip", "eps_clip_high", "eps_clip_c"})
_WITHOUT_CLIP = "importance_sampling"
_ZERO_ADVANTAGE = "zero_advantage_is_ignored"
# What is always so here, whether it is asked for or not: every output and every statistic is computed and returned.
_ALWAYS = frozenset({"return_per_token", "compute_kl_stats", "lm_head_fp32", "num_chunks"})
# Values that change nothing; any other value asks for something that is not had.
_NEUTRAL: Mapping[str, tuple[frozenset[object], str]] = {
    "temperature": (frozenset({1, None}), "log-probabilities are those of temperature 1"),
    "logprob_temperature": (frozenset({1, None}), "log-probabilities are those of temperature 1"),
    "ignore_index": (frozenset({-100, None}), "a target that is none is -100"),
    "compute_ref_logprobs": (frozenset({False, None}), "send the old log-probabilities, which /forward gives"),
    "compute_per_sample_k3": (frozenset({False, None}), "the metric k3:mean is that of all datums together"),
}

Param = bool | int | float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A loss with its parameters. config: what the engine's loss takes.

    zero_advantage_is_ignored: tokens of advantage 0 count as no tokens, so that they are left out of means.
    """

    card: LossCard
    config: Mapping[str, float | str]
    zero_advantage_is_ignored: bool = False


def asked_loss(card: EngineCard, name: str, params: Mapping[str, Param], *, field: str) -> Asked:
    """The loss of a request. field: where the parameters were sent.

    Raises InvalidRequest for an unknown name or parameter, Unsupported for one that is known and not had. Whether a value is in range
    is checked with the data.
    """
    loss = loss_card(card, name)
    known = {param.name for param in loss.params}
    config: dict[str, float | str] = {}
    for key, value in params.items():
        if key in known:
            if value is not None:
                config[key] = value if isinstance(value, str) else _number(value, f"{field}.{key}")
        elif key in _NEUTRAL:
            neutral, why = _NEUTRAL[key]
            if value not in neutral:
                raise Unsupported(f"{field}.{key}: {value!r} is not offered here; {why}")
        elif key not in _ALWAYS and key != _ZERO_ADVANTAGE and not (name == _WITHOUT_CLIP and key in _CLIP_PARAMS):
            raise InvalidRequest(f"{field}: {name} has no {key}; it has: {', '.join(sorted(known)) or 'none'}")
    zero = params.get(_ZERO_ADVANTAGE, False)
    if not isinstance(zero, bool):
        raise InvalidRequest(f"{field}.{_ZERO_ADVANTAGE}: {zero!r} is neither true nor false")
    return Asked(card=loss, config=config, zero_advantage_is_ignored=zero)


def _number(value: float, field: str) -> float:
    """The JSON number as a float, which has an end where JSON's integers have none."""
    try:
        number = float(value)
    except OverflowError as error:
        raise InvalidRequest(f"{field}: an integer of hundreds of digits; send a number within float32") from error
    check_fits(number, field)
    return number
