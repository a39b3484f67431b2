"""What counts as the same outcome after a replay."""

import numpy as np
import pytest

from gradstream.shared import codec
from gradstream.shared.columns import Column
from gradstream.shared.wire import Failed, ForwardBackwardDone, OptimStepDone, Outcome
from gradstream.worker.recovery.compare import exact, tolerant


def passed(*values: float, loss: float = 1.0) -> ForwardBackwardDone:
    column = Column.of([np.array(values, dtype=np.float32)], dtype="float32")
    return ForwardBackwardDone(outputs={"logprobs": column}, metrics={"loss:sum": loss})


FAILED = Failed(code="non_finite", category="user", message="nan")


def test_the_same_bytes_agree_in_every_mode() -> None:
    for outcome in (passed(-1.0, -2.0), OptimStepDone(metrics={"step": 1.0}), FAILED):
        assert exact(codec.encode(outcome), outcome) is None
        assert tolerant(0.0)(codec.encode(outcome), outcome) is None


@pytest.mark.parametrize(
    ("recorded", "given", "what"),
    [
        (passed(-1.0), passed(-1.0, loss=1.0000001), "loss:sum is 1.0000001 and was 1.0"),
        (passed(-1.0, -2.0), passed(-1.0, -2.5), "logprobs of datum 0 differs by up to 0.5"),
        (passed(-1.0), passed(-1.0, -2.0), "logprobs has another shape"),
        (OptimStepDone(metrics={"step": 1.0}), OptimStepDone(metrics={"lr": 1.0}), "its metrics are ['lr']"),
        (passed(-1.0), FAILED, "it failed (nan) and had been done"),
        (FAILED, passed(-1.0), "it was done and had failed (nan)"),
    ],
)
def test_a_difference_is_told_in_numbers(recorded: Outcome, given: Outcome, what: str) -> None:
    assert what in (exact(codec.encode(recorded), given) or "")


def test_a_tolerance_is_relative_and_the_first_number_beyond_it_is_named() -> None:
    compare = tolerant(1e-3)
    assert compare(codec.encode(passed(-1000.0, loss=5000.0)), passed(-1000.5, loss=5004.0)) is None
    assert "loss:sum" in (compare(codec.encode(passed(-1.0, loss=5000.0)), passed(-1.0, loss=5006.0)) or "")
    assert "logprobs" in (compare(codec.encode(passed(-1.0)), passed(-1.1)) or "")
    assert compare(codec.encode(passed(-1.0)), FAILED) is not None
