"""Full weights on two ranks: what one rank gives, and the same bits on both."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, open_engine, random_data
from tests.support.full import MODEL, create_full, full_driver
from tests.support.ranks import Ranks
from tests.support.snapshots import assert_same_state, restore, snapshot

from gradstream.engine.parallel.comm import Comm
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared.wire import Failed, ForwardBackwardDone, ResetModel, RestoreSnapshot, UnloadModel

pytestmark = pytest.mark.gloo


@dataclass
class Report:
    losses: list[float]
    logprobs: list[np.ndarray]
    grads: list[np.ndarray]
    failures: list[str]
    states: list[ModelState]


def _train(comm: Comm, path: Path) -> Report:
    """Three rounds of a bad job and two good ones in a batch, one of them accumulated on the other; then a step."""
    driver = full_driver(path, comm, row_budget_tokens=64, reduction="token_mean")
    report = Report([], [], [], [], [])
    for number in range(3):
        huge = random_data([6], seed=9)
        huge.weights[0][2] = 3e38
        jobs = [huge, random_data([30, 7, 50], seed=number), random_data([12, 12, 3], seed=10 + number)]
        for outcome in driver.run(*((MODEL, cross_entropy(job)) for job in jobs)):
            if isinstance(outcome, ForwardBackwardDone):
                report.losses.append(outcome.metrics["loss:sum"])
                report.logprobs.extend(outcome.outputs["logprobs"].arrays())
            else:
                assert isinstance(outcome, Failed)
                report.failures.append(outcome.code)
        report.grads.append(driver.grad(MODEL).numpy())
        driver.step(MODEL, learning_rate=1e-3, eps=1e-6)
    report.states.extend(driver.engine.capture([MODEL]))
    return report


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_two_ranks_equal_one(path: Path, two_ranks: Ranks) -> None:
    one = _train(Comm.single(), path)
    first, second = two_ranks.run(_train, path)
    assert one.failures == first.failures == ["non_finite"] * 3
    np.testing.assert_allclose(first.losses, one.losses, rtol=1e-4)
    for got, want in zip(first.logprobs, one.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
    assert np.linalg.norm(first.grads[0] - one.grads[0]) < 1e-5 * np.linalg.norm(one.grads[0])
    for got, want in zip(first.grads, one.grads, strict=True):
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)
    for mine, yours in zip(first.grads, second.grads, strict=True):
        np.testing.assert_array_equal(mine, yours)
    assert_same_state(*first.states, *second.states)


def _again(comm: Comm) -> tuple[ModelState, ModelState, ModelState]:
    """A fresh model; after training, a reset and more training, dropped and made again; and reset with weights."""
    driver = full_driver(DENSE, comm)
    (fresh,) = driver.engine.capture([MODEL])
    _some(driver)
    driver.done(MODEL, UnloadModel())
    driver.done(MODEL, create_full())
    (made_again,) = driver.engine.capture([MODEL])
    _some(driver)
    driver.done(MODEL, ResetModel(weights=True))
    (reset,) = driver.engine.capture([MODEL])
    return fresh, made_again, reset


def _some(driver: Driver) -> None:
    for number in range(2):
        driver.done(MODEL, cross_entropy(random_data([30, 7, 12], seed=number)))
        driver.step(MODEL, learning_rate=1e-2)
    driver.done(MODEL, cross_entropy(random_data([30, 7, 12], seed=5)))


def test_both_ranks_read_the_files_weights_again(two_ranks: Ranks) -> None:
    for fresh, made_again, reset in two_ranks.run(_again):
        assert_same_state(fresh, made_again)
        assert_same_state(fresh, reset)


def _first_part(comm: Comm, directory: Path, dtype: str) -> ModelState:
    driver = full_driver(DENSE, comm, dtype=dtype)
    _some(driver)
    if comm.is_leader:
        snapshot(driver.engine, directory)
    return driver.engine.capture([MODEL])[0]


def _restored(comm: Comm, directory: Path, dtype: str) -> list[ModelState]:
    driver = Driver(open_engine(DENSE, comm, is_lora=False, dtype=dtype))
    restore(driver.engine, RestoreSnapshot(directory=str(directory), epoch=1, number=1, drop_others=True))
    (state,) = driver.engine.capture([MODEL])
    driver.step(MODEL, learning_rate=1e-2)
    return [state, *driver.engine.capture([MODEL])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ranks_hold_what_the_leader_wrote(two_ranks: Ranks, tmp_path: Path, dtype: str) -> None:
    first, second = two_ranks.run(_first_part, tmp_path, dtype)
    assert_same_state(first, second)
    (mine, later), (yours, others) = two_ranks.run(_restored, tmp_path, dtype)
    assert_same_state(first, mine)
    assert_same_state(first, yours)
    assert_same_state(later, others)
