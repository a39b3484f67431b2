"""A full-weight run that goes on from a snapshot in another engine is the run that never stopped, bit for bit."""

from collections.abc import Mapping
from pathlib import Path

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
)
from tests.support.full import MODEL, full_driver, full_model
from tests.support.snapshots import assert_same_state, restore, snapshot

from gradstream.shared.wire import (
    Failed,
    OffloadModel,
    OptimizerSpec,
    RestoredModel,
    RestoreSnapshotDone,
)

ADAM = {"learning_rate": 1e-3, "weight_decay": 0.01}


def part(driver: Driver, rounds: range) -> list[object]:
    """Losses and log-probabilities of rounds; a step after every third."""
    seen: list[object] = []
    for number in rounds:
        outcome = driver.done(MODEL, cross_entropy(random_data([30, 7], seed=number)))
        seen.append((loss_of(outcome), [row.tobytes() for row in logprobs_of(outcome)]))
        if number % 3 == 2:
            seen.append(driver.step(MODEL, **ADAM).metrics)  # type: ignore[union-attr]
    return seen


WAYS: dict[str, tuple[Path, dict[str, object], dict[str, object]]] = {
    "dense": (DENSE, {}, {}),
    "moe": (MOE, {}, {"reduction": "token_mean"}),
    "bfloat16": (DENSE, {"dtype": "bfloat16"}, {}),
    "no master": (DENSE, {"dtype": "bfloat16", "master_dtype": "bf16"}, {"optimizer": OptimizerSpec(dtype="bf16")}),
    "muon": (DENSE, {}, {"optimizer": OptimizerSpec(type="muon")}),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_going_on_from_a_snapshot_gives_the_bits_of_never_having_stopped(
    tmp_path: Path, way: tuple[Path, Mapping[str, object], Mapping[str, object]]
) -> None:
    path, config, model = way

    def fresh() -> Driver:
        return full_driver(path, row_budget_tokens=64, **config, **model)  # type: ignore[arg-type]

    whole = fresh()
    expected = part(whole, range(8))

    first = fresh()
    before = part(first, range(4))
    payload = snapshot(first.engine, tmp_path)
    second = Driver(open_engine(path, is_lora=False, **config), row_budget_tokens=64)
    outcome = restore(second.engine, payload)
    assert outcome == RestoreSnapshotDone(models=[RestoredModel(model_id=MODEL, tenant="local", step=1)])
    (held,), (restored,) = first.engine.capture([MODEL]), second.engine.capture([MODEL])
    assert_same_state(held, restored)
    assert (held.valid_tokens, held.reduction, held.optimizer) == (37, restored.reduction, restored.optimizer)
    after = part(second, range(4, 8))

    assert before + after == expected
    assert_same_state(*whole.engine.capture([MODEL]), *second.engine.capture([MODEL]))


def test_a_copy_does_not_change_when_training_goes_on() -> None:
    driver = full_driver()
    part(driver, range(2))
    (copy,), (other,) = driver.engine.capture([MODEL]), driver.engine.capture([MODEL])
    assert copy.kind == "full"
    part(driver, range(2, 4))
    assert_same_state(copy, other)
    assert not (driver.weights(MODEL) == copy.tensors["weights"]).all()


def test_a_snapshot_goes_over_the_model_that_is_there(tmp_path: Path) -> None:
    driver = full_driver()
    part(driver, range(4))
    (then,) = driver.engine.capture([MODEL])
    payload = snapshot(driver.engine, tmp_path)
    part(driver, range(4, 8))
    restore(driver.engine, payload)
    assert_same_state(then, *driver.engine.capture([MODEL]))


def test_a_model_that_slept_sleeps_again(tmp_path: Path) -> None:
    driver = full_driver()
    part(driver, range(4))
    driver.done(MODEL, OffloadModel(asleep=True))
    payload = snapshot(driver.engine, tmp_path)
    other = Driver(open_engine(is_lora=False))
    restore(other.engine, payload)
    (refused,) = other.run((MODEL, cross_entropy(random_data([4]))))
    assert isinstance(refused, Failed)
    for one in (driver, other):
        one.done(MODEL, OffloadModel(asleep=False))
    assert part(other, range(4, 6)) == part(driver, range(4, 6))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"is_lora": True}, "is of full weights, and this server trains LoRA adapters"),
        ({"is_lora": False, "dtype": "bfloat16", "master_dtype": "bf16"}, "its 'weights' is"),
        ({"is_lora": False, "path": MOE}, "it is of weights with other names or shapes"),
    ],
    ids=["adapters", "other dtype", "other model"],
)
def test_a_snapshot_that_does_not_fit_says_why_and_changes_nothing(
    tmp_path: Path, config: dict[str, object], reason: str
) -> None:
    payload = snapshot(full_driver().engine, tmp_path)
    other = open_engine(**config)  # type: ignore[arg-type]
    outcome = restore(other, payload)
    assert isinstance(outcome, RestoreSnapshotDone)
    assert reason in outcome.failed[MODEL]
    assert not other.state.models


def test_adapters_do_not_fit_a_server_that_trains_full_weights(tmp_path: Path) -> None:
    lora = Driver(open_engine())
    lora.create("a")
    outcome = restore(open_engine(is_lora=False), snapshot(lora.engine, tmp_path))
    assert isinstance(outcome, RestoreSnapshotDone)
    assert "is a LoRA adapter, and this server trains full weights" in outcome.failed["a"]  # type: ignore[index]


def test_when_the_optimizer_began_comes_back(tmp_path: Path) -> None:
    first = full_driver()
    part(first, range(6))
    full_model(first.engine).optim_began = 2
    payload = snapshot(first.engine, tmp_path)
    second = Driver(open_engine(is_lora=False))
    restore(second.engine, payload)
    assert full_model(second.engine).optim_began == 2
