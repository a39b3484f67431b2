"""Clients of one engine do not feel each other; batches and packings do not change results."""

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    Data,
    Driver,
    create,
    cross_entropy,
    logprobs_of,
    loss_of,
    open_engine,
    random_data,
    randomize,
)

from gradstream.engine import rows
from gradstream.engine.losses._base import Loss, LossArguments, LossResult
from gradstream.engine.losses._valid import Valid, evaluate_valid
from gradstream.shared.columns import Column
from gradstream.shared.ids import LOCAL_TENANT, ModelId, TenantId
from gradstream.shared.wire import (
    IGNORE,
    AdamParams,
    Failed,
    ForwardBackward,
    ForwardBackwardDone,
    OptimStep,
    UnloadModel,
)


@pytest.fixture
def driver() -> Driver:
    return Driver(open_engine())


def test_interleaved_models_end_bit_equal_to_models_that_were_alone(driver: Driver) -> None:
    clients = {
        "a": (4, random_data([20, 7], seed=1)),
        "b": (16, random_data([11], seed=2)),
        "c": (1, random_data([30], seed=3)),
    }
    alone = {}
    for name, (rank, data) in clients.items():
        single = Driver(open_engine())
        single.create(name, rank=rank)
        for _ in range(3):
            single.done(name, cross_entropy(data))
            single.step(name, learning_rate=1e-2)
        alone[name] = single.weights(name)
    for name, (rank, _) in clients.items():
        driver.create(name, rank=rank)
    for _ in range(3):
        for name, (_, data) in clients.items():
            driver.done(name, cross_entropy(data))
        for name in reversed(clients):
            driver.step(name, learning_rate=1e-2)
    for name in clients:
        assert torch.equal(driver.weights(name), alone[name]), name


def test_models_of_different_rank_in_one_pass_get_what_they_get_alone(driver: Driver) -> None:
    clients = {
        "a": (4, random_data([20, 7], seed=1)),
        "b": (16, random_data([11], seed=2)),
        "c": (1, random_data([30, 1], seed=3)),
    }
    alone, losses = {}, {}
    for name, (rank, data) in clients.items():
        driver.create(name, rank=rank, train_unembed=name != "b")
        randomize(driver, name)
        losses[name] = loss_of(driver.done(name, cross_entropy(data)))
        alone[name] = driver.grad(name)
        driver.engine.state.models[ModelId(name)].clear_grad()
    outcomes = driver.run(*((name, cross_entropy(data)) for name, (_, data) in clients.items()))
    for name, outcome in zip(clients, outcomes, strict=True):
        assert loss_of(outcome) == pytest.approx(losses[name], rel=1e-5)
        torch.testing.assert_close(driver.grad(name), alone[name], rtol=1e-4, atol=1e-4)


def _concatenate(parts: list[Data]) -> Data:
    return Data(
        [array for part in parts for array in part.tokens],
        [array for part in parts for array in part.targets],
        [array for part in parts for array in part.weights],
    )


def test_chunked_calls_accumulate_to_one_big_call(driver: Driver) -> None:
    parts = [random_data([9, 14], seed=seed) for seed in range(4)]
    for name in ("whole", "calls", "batch"):
        driver.create(name)
        randomize(driver, name)
    whole = driver.done("whole", cross_entropy(_concatenate(parts)))
    calls = [driver.done("calls", cross_entropy(part)) for part in parts]
    batch = driver.run(*(("batch", cross_entropy(part)) for part in parts))
    for outcomes in (calls, batch):
        assert sum(map(loss_of, outcomes)) == pytest.approx(loss_of(whole), rel=1e-6)
    torch.testing.assert_close(driver.grad("calls"), driver.grad("whole"), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(driver.grad("batch"), driver.grad("whole"), rtol=1e-4, atol=1e-4)


def test_isolated_jobs_of_a_batch_give_the_bits_that_they_give_alone(driver: Driver) -> None:
    # Sizes of every remainder: where a job's numbers lie in memory must not show in them.
    parts = [random_data([9 + 2 * seed, 14, 3 * seed + 1], seed=seed) for seed in range(9)]
    driver.isolate_jobs = True
    for name in ("batch", "alone"):
        driver.create(name)
        randomize(driver, name)
    together = driver.run(*(("batch", cross_entropy(part)) for part in parts))
    alone = [driver.done("alone", cross_entropy(part)) for part in parts]
    assert together == alone
    assert torch.equal(driver.grad("batch"), driver.grad("alone"))


def test_a_packed_batch_gives_what_unpadded_single_runs_give(driver: Driver) -> None:
    data = random_data([3, 40, 17, 17, 1, 8])
    driver.create("packed")
    driver.create("single")
    for name in ("packed", "single"):
        randomize(driver, name)
    packed = logprobs_of(driver.done("packed", cross_entropy(data)))
    for number, want in enumerate(packed):
        (got,) = logprobs_of(driver.done("single", cross_entropy(data[number : number + 1])))
        np.testing.assert_allclose(got, want, atol=1e-5)
    torch.testing.assert_close(driver.grad("single"), driver.grad("packed"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
def test_outputs_come_in_submission_order_whatever_the_rows_are(driver: Driver, budget: int) -> None:
    data = random_data([12, 5, 30, 12, 2])
    driver.create("m")
    want = logprobs_of(driver.done("m", cross_entropy(data, backward=False)))
    driver.row_budget_tokens = budget
    got = logprobs_of(driver.done("m", cross_entropy(data, backward=False)))
    assert [len(array) for array in got] == [12, 5, 30, 12, 2]
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=1e-5)


def test_a_segment_never_sees_its_neighbour(driver: Driver) -> None:
    driver.create("m")
    data = random_data([15, 22])
    other = random_data([15, 22])
    other.tokens[0] = (other.tokens[0] + 1) % 2048
    before = logprobs_of(driver.done("m", cross_entropy(data, backward=False)))
    after = logprobs_of(driver.done("m", cross_entropy(other, backward=False)))
    assert not np.array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


def test_a_non_finite_job_fails_alone(driver: Driver) -> None:
    for name in ("good", "bad"):
        driver.create(name)
        randomize(driver, name)
    data = random_data([16, 9])
    driver.done("good", cross_entropy(data))
    want = driver.grad("good")
    driver.engine.state.models[ModelId("good")].clear_grad()
    driver.engine.state.models[ModelId("bad")].weights.fill_(float("nan"))
    bad, good = driver.run(("bad", cross_entropy(data)), ("good", cross_entropy(data)))
    assert isinstance(bad, Failed)
    assert bad.code == "non_finite"
    assert isinstance(good, ForwardBackwardDone)
    torch.testing.assert_close(driver.grad("good"), want, rtol=1e-4, atol=1e-4)
    assert not driver.engine.state.models[ModelId("bad")].has_grad
    assert not driver.grad("bad").any()


def _job_of_kind(kind: str, lengths: list[int], *, seed: int) -> ForwardBackward:
    data = random_data(lengths, seed=seed)
    if kind == "masked":
        data.targets[-1][3:9] = IGNORE
    if kind in ("plain", "forward", "masked"):
        return cross_entropy(data, backward=kind != "forward")
    sampled = [np.full(length, -7.0 - at, dtype=np.float32) for at, length in enumerate(lengths)]
    inputs = {
        "target_tokens": Column.of(data.targets, dtype="int64"),
        "logprobs": Column.of(sampled, dtype="float32"),
        "advantages": Column.of(data.weights, dtype="float32"),
    }
    if kind == "gspo":
        mask = [np.ones(length, dtype=np.float32) for length in lengths]
        inputs["sequence_ratio_mask"] = Column.of(mask, dtype="float32")
    return ForwardBackward(
        tokens=Column.of(data.tokens, dtype="int32"),
        inputs=inputs,
        loss_fn="gspo" if kind == "gspo" else "ppo",
        loss_config={"clip_low_threshold": 0.99, "clip_high_threshold": 1.01} if kind == "narrow ppo" else {},
    )


# Datum lengths of two jobs of each kind of loss. Jobs of as many tokens become neighbours, and longer ones come later.
PAIRS = {
    "plain": ([16, 9], [25]),
    "forward": ([16, 10], [7, 19]),
    "ppo": ([14, 13], [9, 18]),
    "narrow ppo": ([20, 8], [28]),
    "gspo": ([14, 15], [11, 18]),
    "masked": ([12, 20], [70]),
}


@pytest.mark.parametrize("broken", [None, *PAIRS])
def test_jobs_of_all_kinds_in_one_batch_get_what_each_gets_alone_also_beside_one_that_is_not_finite(
    driver: Driver, broken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job of the broken kind is not finite; its loss is computed at once with that of the second one."""
    jobs = {
        f"{kind} {number}": _job_of_kind(kind, pair[number], seed=number)
        for number in range(2)
        for kind, pair in PAIRS.items()
    }
    wants = {}
    for number, (name, payload) in enumerate(jobs.items()):
        driver.create(name)
        randomize(driver, name, seed=number)
        wants[name] = driver.done(name, payload), driver.grad(name)
        driver.engine.state.models[ModelId(name)].clear_grad()
    if broken is not None:
        driver.engine.state.models[ModelId(f"{broken} 0")].weights.fill_(float("nan"))
    together = []

    def evaluate(loss: Loss, arguments: LossArguments, is_valid_T: Valid, *, with_grad: bool) -> LossResult:
        together.append(list(arguments.lengths))
        return evaluate_valid(loss, arguments, is_valid_T, with_grad=with_grad)

    monkeypatch.setattr(rows, "evaluate_valid", evaluate)

    outcomes = dict(zip(jobs, driver.run(*jobs.items()), strict=True))

    assert together == [[*first, *second] for first, second in PAIRS.values()]
    for name, (want, want_grad) in wants.items():
        if name == f"{broken} 0":
            assert isinstance(outcomes[name], Failed)
            assert not driver.grad(name).any()
            continue
        assert loss_of(outcomes[name]) == pytest.approx(loss_of(want), rel=1e-4, abs=1e-4)
        for got, expected in zip(logprobs_of(outcomes[name]), logprobs_of(want), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(driver.grad(name), want_grad, rtol=1e-3, atol=1e-4)


def test_a_non_finite_job_leaves_what_its_model_had_accumulated(driver: Driver) -> None:
    driver.create("m")
    data = random_data([16, 9])
    driver.done("m", cross_entropy(data))
    before = driver.grad("m")
    huge = random_data([16, 9])
    huge.weights[1][4] = 3e38
    bad, good = driver.run(("m", cross_entropy(huge)), ("m", cross_entropy(data)))
    assert isinstance(bad, Failed)
    assert "datum 1" in bad.message
    assert "position 4" in bad.message
    assert isinstance(good, ForwardBackwardDone)
    torch.testing.assert_close(driver.grad("m"), 2 * before, rtol=1e-4, atol=1e-4)


def test_a_gradient_that_overflows_fails_its_job_and_is_not_accumulated(driver: Driver) -> None:
    driver.create("m")
    data = random_data([16])
    data.weights = [np.full(16, 1e37, dtype=np.float32)]
    randomize(driver, "m", std=5.0)
    (outcome,) = driver.run(("m", cross_entropy(data)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "non_finite"
    assert not driver.grad("m").any()


def test_a_forward_gives_the_same_log_probabilities_and_no_gradient(driver: Driver) -> None:
    driver.create("m")
    randomize(driver, "m")
    data = random_data([16, 3])
    forward = driver.done("m", cross_entropy(data, backward=False))
    assert not driver.engine.state.models[ModelId("m")].has_grad
    both = driver.done("m", cross_entropy(data))
    np.testing.assert_array_equal(np.concatenate(logprobs_of(forward)), np.concatenate(logprobs_of(both)))
    assert loss_of(forward) == loss_of(both)


def test_zero_weights_give_log_probabilities_and_an_exactly_zero_gradient(driver: Driver) -> None:
    driver.create("m")
    randomize(driver, "m")
    data = random_data([16, 3])
    data.weights = [np.zeros_like(weights) for weights in data.weights]
    outcome = driver.done("m", cross_entropy(data))
    assert loss_of(outcome) == 0.0
    assert np.isfinite(np.concatenate(logprobs_of(outcome))).all()
    assert not driver.grad("m").any()


def test_the_same_seed_gives_the_same_adapter_whoever_else_is_there(driver: Driver) -> None:
    driver.create("other", rank=3, seed=9)
    driver.create("m", rank=8, seed=5)
    fresh = Driver(open_engine())
    fresh.create("m2", rank=8, seed=5)
    assert torch.equal(driver.weights("m"), fresh.weights("m2"))
    driver.create("another", rank=8, seed=6)
    assert not torch.equal(driver.weights("m"), driver.weights("another"))


def test_without_a_seed_the_model_id_decides(driver: Driver) -> None:
    driver.create("x", seed=None)
    driver.create("y", seed=None)
    fresh = Driver(open_engine())
    fresh.create("x", seed=None)
    assert torch.equal(driver.weights("x"), fresh.weights("x"))
    assert not torch.equal(driver.weights("x"), driver.weights("y"))


def test_a_new_adapter_changes_nothing_yet(driver: Driver) -> None:
    driver.create("x", rank=2, seed=1)
    driver.create("y", rank=32, seed=2)
    data = random_data([10])
    x, y = driver.run(("x", cross_entropy(data, backward=False)), ("y", cross_entropy(data, backward=False)))
    np.testing.assert_allclose(logprobs_of(x)[0], logprobs_of(y)[0], atol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 65])
def test_a_rank_out_of_bounds_is_refused_with_the_bounds(driver: Driver, rank: int) -> None:
    (outcome,) = driver.run(("m", create(rank=rank)))
    assert isinstance(outcome, Failed)
    assert "1 to 64" in outcome.message
    assert not driver.engine.state.models


def test_an_adapter_that_trains_nothing_is_refused(driver: Driver) -> None:
    (outcome,) = driver.run(("m", create(train_attn=False, train_mlp=False, train_unembed=False)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "invalid_request"


def test_another_base_model_is_refused_with_the_names_that_are_served(driver: Driver) -> None:
    (outcome,) = driver.run(("m", create(base_model="large")))
    assert isinstance(outcome, Failed)
    assert "'large'" in outcome.message
    assert "tiny" in outcome.message


def test_an_unknown_model_is_an_outcome_not_a_crash(driver: Driver) -> None:
    (outcome,) = driver.run(("ghost", cross_entropy(random_data([4]))))
    assert isinstance(outcome, Failed)
    assert outcome.code == "unknown_model"


def test_another_tenants_model_is_unknown(driver: Driver) -> None:
    driver.create("m")
    (outcome,) = driver.run(("m", OptimStep(adam=AdamParams())), tenant=TenantId("mallory"))
    assert isinstance(outcome, Failed)
    assert outcome.code == "unknown_model"
    assert driver.engine.state.models[ModelId("m")].step == 0
    assert driver.engine.state.models[ModelId("m")].tenant == LOCAL_TENANT


def test_an_unloaded_model_is_gone(driver: Driver) -> None:
    driver.create("m")
    driver.done("m", UnloadModel())
    (outcome,) = driver.run(("m", OptimStep(adam=AdamParams())))
    assert isinstance(outcome, Failed)
