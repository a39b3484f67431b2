"""Updates of several models at once: each model has the bits that it would have by itself, and its own failure."""

from contextlib import nullcontext

import pytest
import torch
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data

from gradstream.engine.optim.together import update_together
from gradstream.engine.optim.update import StepFacts
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import AdamParams, Failed, OptimStep, OptimStepDone

ADAMS = {
    "a": AdamParams(learning_rate=1e-2),
    "b": AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=0.5),
    "c": AdamParams(learning_rate=3e-3, beta1=0.8),
    "d": AdamParams(learning_rate=1e-2),
}


@pytest.fixture(scope="module")
def engine():
    return open_engine()


@pytest.fixture
def driver(engine):
    driver = Driver(engine)
    for number, name in enumerate(ADAMS):
        driver.create(name, rank=3 + number)
    yield driver
    engine.state.models.clear()


def _accumulate(driver: Driver) -> None:
    for number, name in enumerate(ADAMS):
        driver.done(name, cross_entropy(random_data([9 + number], seed=number)))


def _tensors(driver: Driver, name: str) -> dict[str, torch.Tensor]:
    model = driver.engine.state.models[ModelId(name)]
    return {"weights": model.weights.clone(), **{part: values.clone() for part, values in model.optim.items()}}


def test_models_in_one_batch_get_the_bits_that_each_gets_by_itself(driver):
    metrics = {}
    before = {name: _tensors(driver, name) for name in ADAMS}
    for _ in range(2):
        _accumulate(driver)
        for name, adam in ADAMS.items():
            outcome = driver.done(name, OptimStep(adam=adam))
            metrics[name] = outcome.metrics
    after = {name: _tensors(driver, name) for name in ADAMS}
    for name in ADAMS:
        model = driver.engine.state.models[ModelId(name)]
        model.weights.copy_(before[name]["weights"])
        model.step = 0
        for values in model.optim.values():
            values.zero_()

    for _ in range(2):
        _accumulate(driver)
        outcomes = driver.run(*((name, OptimStep(adam=adam)) for name, adam in ADAMS.items()))

    for (name, expected), outcome in zip(after.items(), outcomes, strict=True):
        assert isinstance(outcome, OptimStepDone)
        assert outcome.metrics == metrics[name]
        for part, values in _tensors(driver, name).items():
            assert torch.equal(values, expected[part]), f"{name} {part}"
        assert not driver.grad(name).any()


@pytest.mark.parametrize("fault", ["gradient", "weights", "hyper-parameters"])
def test_what_fails_one_models_step_leaves_it_as_it_was_and_the_others_step(driver, fault):
    _accumulate(driver)
    broken = driver.engine.state.models[ModelId("b")]
    adams = dict(ADAMS)
    if fault == "gradient":
        broken.grad[5] = torch.inf
    elif fault == "weights":
        adams["b"] = AdamParams(learning_rate=1e38, weight_decay=1e38)
    else:
        adams["b"] = AdamParams(beta1=-1.0)
    before, grad = _tensors(driver, "b"), driver.grad("b")

    outcomes = driver.run(*((name, OptimStep(adam=adam)) for name, adam in adams.items()))

    assert [isinstance(outcome, Failed) for outcome in outcomes] == [False, True, False, False]
    assert all(torch.equal(values, before[part]) for part, values in _tensors(driver, "b").items())
    assert torch.equal(driver.grad("b"), grad)
    assert broken.step == 0
    assert [driver.engine.state.models[ModelId(name)].step for name in "acd"] == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "is_made"), [(torch.float32, True), (torch.bfloat16, False)], ids=["float32", "bfloat16"]
)
def test_a_weight_that_becomes_inf_where_passes_round_it_fails_its_own_models_step_alone(driver, dtype, is_made):
    _accumulate(driver)
    models = [driver.engine.state.models[ModelId(name)] for name in ADAMS]
    largest = torch.finfo(torch.float32).max
    models[1].weights[3] = -largest
    adam = AdamParams(learning_rate=0.0)

    results = update_together(
        [(model, adam) for model in models], seed=0, schedule=None, compute_dtype=dtype, computing=nullcontext()
    )

    assert [isinstance(result, StepFacts) for result in results] == [True, is_made, True, True]
    assert [model.step for model in models] == [1, int(is_made), 1, 1]


def test_a_model_too_large_to_be_together_leaves_the_room_to_the_small_ones_after_it(driver, monkeypatch):
    driver.create("large", rank=16)
    sizes = {name: driver.engine.state.models[ModelId(name)].layout.num_params for name in ("large", "a", "b", "c")}
    room = sizes["a"] + sizes["b"]
    assert sizes["large"] > room
    monkeypatch.setattr("gradstream.engine.ops.optim_step.most_numbers", lambda _: room)
    together = []

    def noting(wanted, **more):
        together.extend(model.model_id for model, _ in wanted)
        return update_together(wanted, **more)

    monkeypatch.setattr("gradstream.engine.ops.optim_step.update_together", noting)
    _accumulate(driver)
    driver.done("large", cross_entropy(random_data([9])))

    outcomes = driver.run(*((name, OptimStep(adam=AdamParams())) for name in sizes))

    assert all(isinstance(outcome, OptimStepDone) for outcome in outcomes)
    assert together == ["a", "b"]


def test_a_device_without_room_for_all_at_once_serves_them_one_by_one(driver, monkeypatch):
    _accumulate(driver)

    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("torch._foreach_div", full)

    outcomes = driver.run(*((name, OptimStep(adam=adam)) for name, adam in ADAMS.items()))

    assert all(isinstance(outcome, OptimStepDone) for outcome in outcomes)
