"""A loss's parameters, checked against its card; the API and the engine refuse the same values with the same words."""

import math
from collections.abc import Mapping

from gradstream.shared.catalog import LossCard, LossInput, LossParam
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.hyperparameters import check_fits

# None: the parameter is off.
Value = float | str | None


def loss_params(card: LossCard, config: Mapping[str, float | str]) -> dict[str, Value]:
    """Every parameter of the card in the card's order, from config or by default; raises InvalidRequest that names the field."""
    specs = {spec.name: spec for spec in card.params}
    unknown = sorted(config.keys() - specs.keys())
    if unknown:
        known = ", ".join(sorted(specs)) or "none"
        raise InvalidRequest(f"loss_fn_config: {card.name} has no {', '.join(unknown)}; it has: {known}")
    params = {name: _checked(config[name], spec) if name in config else spec.default for name, spec in specs.items()}
    for spec in card.params:
        low, high = params[spec.name], None if spec.not_above is None else params[spec.not_above]
        if isinstance(low, float | int) and isinstance(high, float | int) and low > high:
            raise InvalidRequest(f"loss_fn_config.{spec.name}: {low} is above {spec.not_above}, {high}")
    return params


def is_required(spec: LossInput, params: Mapping[str, Value]) -> bool:
    """Whether the loss cannot be computed without this input, given all its parameters."""
    return spec.required or any(params[name] for name in spec.required_by)


def _checked(value: float | str, spec: LossParam) -> float | str:
    field = f"loss_fn_config.{spec.name}"
    is_text = isinstance(spec.default, str)
    if isinstance(value, str) != is_text:
        kind, wanted = ("number", "text") if is_text else ("text", "number")
        raise InvalidRequest(f"{field}: {value!r} is a {kind}; it must be a {wanted}")
    if spec.choices and value not in spec.choices:
        raise InvalidRequest(f"{field}: {value!r} is not one of {', '.join(map(str, spec.choices))}")
    if isinstance(value, str):
        return value
    low = -math.inf if spec.minimum is None else spec.minimum
    high = math.inf if spec.maximum is None else spec.maximum
    if not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{field}: {value} is not between {low} and {high}")
    check_fits(value, field)
    return float(value)
