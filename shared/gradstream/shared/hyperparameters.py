"""Numbers that clients choose for their training: what the API and the engine refuse alike, in the same words.

JSON numbers are doubles; the engine computes in float32, and torch raises on a factor that float32 cannot hold.
"""

import math

import msgspec

from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import AdamParams, OptimizerSpec

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127


def check_fits(value: float, field: str) -> None:
    """Raise InvalidRequest, naming the field, unless the number is finite as float32, where one that is too small is 0."""
    if not math.isfinite(value):
        raise InvalidRequest(f"{field}: {value} must be a finite number")
    if abs(value) > MAX_FLOAT32:
        raise InvalidRequest(
            f"{field}: {value} is beyond float32, in which the server computes; send a number within {MAX_FLOAT32:.6g}"
        )


def check_adam(adam: AdamParams) -> None:
    """Raise InvalidRequest, naming the field, when a hyper-parameter of a step is out of its range."""
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(adam, name)
        check_fits(value, f"adam_params.{name}")
        if value < 0:
            raise InvalidRequest(f"adam_params.{name}: {value} must be a finite number, 0 or more")
    for name in ("beta1", "beta2"):
        value = getattr(adam, name)
        if not 0 <= value < 1:
            raise InvalidRequest(f"adam_params.{name}: {value} must be at least 0 and below 1")


def check_optimizer_numbers(spec: OptimizerSpec, *, field: str) -> None:
    """Raise InvalidRequest, naming the field below `field`, when a number of the optimizer is not finite as float32.

    Whether it is in its optimizer's range is for the engine to check.
    """
    for name, value in msgspec.structs.asdict(spec).items():
        if isinstance(value, float):
            check_fits(value, f"{field}.{name}")


def check_alpha(alpha: float, *, rank: int, field: str) -> None:
    """Raise InvalidRequest, naming the field, unless alpha and alpha / rank, by which an adapter is scaled, can be computed with."""
    check_fits(alpha, field)
    if alpha <= 0:
        raise InvalidRequest(f"{field}: {alpha} must be a finite number above 0")
    check_fits(alpha / rank, f"{field} / rank")
