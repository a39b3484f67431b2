"""A run that goes on from a snapshot in another engine is the run that never stopped, bit for bit."""

import pytest
from tests.support.engine_builders import (
    DENSE,
    MOE,
    Driver,
    cross_entropy,
    logprobs_of,
    loss_of,
    open_engine,
    random_data,
    randomize,
)
from tests.support.snapshots import assert_same_state, restore, snapshot

from gradstream.engine.snapshot.capture import capture
from gradstream.shared.errors import UnknownModel
from gradstream.shared.wire import RestoredModel, RestoreSnapshotDone

ADAM = {"learning_rate": 1e-2, "weight_decay": 0.01}


def fresh(path=DENSE):
    """Two models on a new engine, with b not zero."""
    driver = Driver(open_engine(path), row_budget_tokens=64)
    for model, rank in (("a", 4), ("b", 8)):
        driver.create(model, rank=rank, seed=None)
        randomize(driver, model)
    return driver


def part(driver, rounds):
    """Losses and log-probabilities of rounds 0 to 9: shared passes of both models; a steps after every third, b after every fourth."""
    seen = []
    for number in rounds:
        work = [("a", [30, 7]), ("b", [12, 3, 20])]
        outcomes = driver.run(*((model, cross_entropy(random_data(lengths, seed=number))) for model, lengths in work))
        seen += [(loss_of(outcome), [row.tobytes() for row in logprobs_of(outcome)]) for outcome in outcomes]
        for model, every in (("a", 3), ("b", 4)):
            if number % every == every - 1:
                seen.append(driver.step(model, **ADAM).metrics)
    return seen


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_going_on_from_a_snapshot_gives_the_bits_of_never_having_stopped(tmp_path, path):
    whole = fresh(path)
    expected = part(whole, range(10))

    first = fresh(path)
    before = part(first, range(5))
    # a stepped once and holds two accumulated gradients; b stepped once and holds one.
    assert [first.engine.state.models[name].has_grad for name in "ab"] == [True, True]
    payload = snapshot(first.engine, tmp_path)
    second = Driver(open_engine(path), row_budget_tokens=64)
    outcome = restore(second.engine, payload)
    assert outcome == RestoreSnapshotDone(
        models=[RestoredModel(model_id=name, tenant="local", step=1) for name in "ab"]
    )
    after = part(second, range(5, 10))

    assert before + after == expected
    for left, right in zip(whole.engine.capture("ab"), second.engine.capture("ab"), strict=True):
        assert_same_state(left, right)


def test_training_goes_on_while_a_copy_waits_to_be_written():
    driver = fresh()
    part(driver, range(2))
    copies = driver.engine.capture("ab")
    again = driver.engine.capture("ab")
    part(driver, range(2, 6))
    for copy, other in zip(copies, again, strict=True):
        assert_same_state(copy, other)
    assert not (driver.weights("a") == copies[0].tensors["weights"]).all()


def test_a_gradient_that_was_used_up_is_not_copied():
    driver = fresh()
    part(driver, range(4))
    (model,) = driver.engine.capture("b")
    assert not model.has_grad
    assert set(model.tensors) == {"weights", "exp_avg", "exp_avg_sq"}
    assert model.size_bytes == 3 * driver.weights("b").nbytes
    assert model.owner.spec.seed is not None


def test_a_model_that_is_not_here_cannot_be_copied():
    with pytest.raises(UnknownModel, match="model x"):
        capture(open_engine().state, ["x"])
