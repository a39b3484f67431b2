"""The loss of each datum, which models that take the mean over tokens report."""

import msgspec
import numpy as np
import pytest
from tests.support.engine_builders import Driver, create, cross_entropy, open_engine, random_data

from gradstream.shared.columns import Column
from gradstream.shared.wire import IGNORE

MODEL = "default"


@pytest.fixture(scope="module")
def driver() -> Driver:
    driver = Driver(open_engine())
    driver.done(MODEL, msgspec.structs.replace(create(), reduction="token_mean"))
    driver.done("s:train:0", create())
    return driver


def masked(lengths: list[int], ignored: dict[int, slice]):
    """cross_entropy of datums, the ignored positions of some of them without a target."""
    payload = cross_entropy(random_data(lengths))
    targets = [array.copy() for array in payload.inputs["target_tokens"].arrays()]
    for index, positions in ignored.items():
        targets[index][positions] = IGNORE
    column = Column.of(targets, dtype=payload.inputs["target_tokens"].dtype)
    return msgspec.structs.replace(payload, inputs={**payload.inputs, "target_tokens": column}), targets


def test_it_is_the_mean_over_the_datums_valid_tokens(driver: Driver) -> None:
    payload, targets = masked([5, 9, 3], {1: slice(0, 4), 2: slice(None)})
    outcome = driver.done(MODEL, payload)
    losses, elementwise = (outcome.outputs[name].arrays() for name in ("loss", "elementwise_loss"))
    assert [loss.shape for loss in losses] == [(1,), (1,), (1,)]
    for loss, values, target in zip(losses, elementwise, targets, strict=True):
        valid = target != IGNORE
        assert loss[0] == pytest.approx(values[valid].mean() if valid.any() else 0.0, rel=1e-6)
    counts = np.array([np.sum(target != IGNORE) for target in targets])
    means = np.array([loss[0] for loss in losses])
    assert outcome.metrics["loss:mean"] == pytest.approx((means * counts).sum() / counts.sum(), rel=1e-6)


def test_a_model_that_sums_reports_what_it_always_did(driver: Driver) -> None:
    outcome = driver.done("s:train:0", cross_entropy(random_data([5, 9])))
    assert set(outcome.outputs) == {"logprobs", "elementwise_loss"}
