"""A snapshot of one rank or of two is restored on two ranks, the same on both; their errors agree too."""

from pathlib import Path

import pytest
from tests.support.engine_builders import Driver, cross_entropy, loss_of, open_engine, random_data, randomize
from tests.support.ranks import Ranks
from tests.support.snapshots import assert_same_state, head, model_state, restore, snapshot

from gradstream.engine.parallel.comm import Comm
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.wire import Outcome, RestoreSnapshot

pytestmark = pytest.mark.gloo

Report = tuple[list[float], list[ModelState]]


def _train(driver: Driver, rounds: range) -> list[float]:
    """Losses of two models that share passes; both step after every second round but keep a gradient after the last."""
    losses = []
    for number in rounds:
        work = [(name, cross_entropy(random_data([30, 7, 12], seed=number))) for name in "ab"]
        losses += [loss_of(outcome) for outcome in driver.run(*work)]
        if number % 2:
            for name in "ab":
                driver.step(name, learning_rate=1e-2)
    return losses


def _driver(comm: Comm) -> Driver:
    return Driver(open_engine(comm=comm), row_budget_tokens=64)


def _start(comm: Comm) -> Driver:
    driver = _driver(comm)
    for name, rank in (("a", 4), ("b", 8)):
        driver.create(name, rank=rank)
        randomize(driver, name)
    return driver


def _whole_run(comm: Comm) -> Report:
    driver = _start(comm)
    return _train(driver, range(7)), driver.engine.capture("ab")


def _first_part(comm: Comm, directory: Path) -> list[float]:
    driver = _start(comm)
    losses = _train(driver, range(3))
    if comm.is_leader:
        snapshot(driver.engine, directory)
    return losses


def _second_part(comm: Comm, directory: Path) -> Report:
    driver = _driver(comm)
    restore(driver.engine, _payload(directory))
    return _train(driver, range(3, 7)), driver.engine.capture("ab")


def _payload(directory: Path) -> RestoreSnapshot:
    return RestoreSnapshot(directory=str(directory), epoch=1, number=1, drop_others=True)


def _restored(comm: Comm, directory: Path) -> tuple[Outcome, list[ModelState]]:
    driver = _start(comm)
    outcome = restore(driver.engine, _payload(directory))
    return outcome, driver.engine.capture(driver.engine.state.models)


def test_two_ranks_go_on_from_their_snapshot_as_if_they_had_never_stopped(two_ranks: Ranks, tmp_path: Path) -> None:
    expected = two_ranks.run(_whole_run)
    before = two_ranks.run(_first_part, tmp_path)
    after = two_ranks.run(_second_part, tmp_path)
    for (losses, states), first, (second, found) in zip(expected, before, after, strict=True):
        assert first + second == losses
        for left, right in zip(states, found, strict=True):
            assert_same_state(left, right)


def test_every_rank_holds_what_one_rank_wrote(two_ranks: Ranks, tmp_path: Path) -> None:
    driver = _start(Comm.single())
    _train(driver, range(3))
    snapshot(driver.engine, tmp_path)
    expected = driver.engine.capture("ab")
    for _, states in two_ranks.run(_restored, tmp_path):
        for left, right in zip(expected, states, strict=True):
            assert_same_state(left, right)


def test_ranks_agree_on_models_that_do_not_fit_and_on_damage(two_ranks: Ranks, tmp_path: Path) -> None:
    driver = _start(Comm.single())
    models = [*driver.engine.capture("a"), model_state("foreign")]
    SnapshotStore(tmp_path).write(head(1), models, live={"a", "foreign"})
    (leader, states), (follower, others) = two_ranks.run(_restored, tmp_path)
    assert leader == follower
    assert list(leader.failed) == ["foreign"]
    assert [state.model_id for state in states] == [state.model_id for state in others] == ["a"]

    (shard,) = (tmp_path / "models" / "a").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    (leader, states), (follower, others) = two_ranks.run(_restored, tmp_path)
    assert leader == follower
    assert leader.code == "storage_failure"
    assert [state.model_id for state in states] == [state.model_id for state in others] == ["a", "b"]
