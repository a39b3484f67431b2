"""Whether a job that ran again gave what it had given."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.wire import Failed, ForwardBackwardDone, OptimStepDone, Outcome

Mode = Literal["exact", "tolerant", "none"]

# None when the outcomes agree, else how they differ. The first argument is msgpack of the recorded one.
Compare = Callable[[bytes, Outcome], str | None]


def exact(recorded: bytes, given: Outcome) -> str | None:
    """Agree when every byte does."""
    data = codec.encode(given)
    if data == recorded:
        return None
    difference = _difference(codec.decode_outcome(recorded), given)
    return difference or f"its outcome has digest {codec.digest(data)} and had {codec.digest(recorded)}"


def tolerant(tolerance: float) -> Compare:
    """Agree when every number of losses, log-probabilities and metrics does within tolerance (relative, and absolute below 1)."""

    def compare(recorded: bytes, given: Outcome) -> str | None:
        if codec.encode(given) == recorded:
            return None
        return _difference(codec.decode_outcome(recorded), given, tolerance=tolerance)

    return compare


def _difference(recorded: Outcome, given: Outcome, *, tolerance: float = 0.0) -> str | None:
    """The first number that differs by more than tolerance, in words."""
    match recorded, given:
        case ForwardBackwardDone(), ForwardBackwardDone():
            return _of_metrics(recorded.metrics, given.metrics, tolerance) or _of_outputs(
                recorded.outputs, given.outputs, tolerance
            )
        case OptimStepDone(), OptimStepDone():
            return _of_metrics(recorded.metrics, given.metrics, tolerance)
        case Failed(), Failed():
            return (
                None
                if recorded.code == given.code
                else f"it failed with {given.code} and had failed with {recorded.code}"
            )
        case _, Failed():
            return f"it failed ({given.message}) and had been done"
        case Failed(), _:
            return f"it was done and had failed ({recorded.message})"
        case _:
            return None if recorded == given else "its outcome is another one"


def _of_metrics(recorded: Mapping[str, float], given: Mapping[str, float], tolerance: float) -> str | None:
    if recorded.keys() != given.keys():
        return f"its metrics are {sorted(given)} and were {sorted(recorded)}"
    for name, old in recorded.items():
        if not _is_close(np.float64(old), np.float64(given[name]), tolerance):
            return f"{name} is {given[name]!r} and was {old!r}"
    return None


def _of_outputs(recorded: Mapping[str, Column], given: Mapping[str, Column], tolerance: float) -> str | None:
    for name, old in recorded.items():
        new = given.get(name)
        if new is None or (new.lengths, new.dtype, new.trailing) != (old.lengths, old.dtype, old.trailing):
            return f"{name} has another shape"
        for datum, (before, after) in enumerate(zip(old.arrays(), new.arrays(), strict=True)):
            if not _is_close(before, after, tolerance):
                worst = float(np.abs(after.astype(np.float64) - before.astype(np.float64)).max())
                return f"{name} of datum {datum} differs by up to {worst:.3g}"
    return None


def _is_close(old: np.ndarray | np.float64, new: np.ndarray | np.float64, tolerance: float) -> bool:
    if not tolerance:
        return np.asarray(old).tobytes() == np.asarray(new).tobytes()
    return bool(np.allclose(new, old, rtol=tolerance, atol=tolerance, equal_nan=True))
