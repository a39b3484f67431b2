"""A device without room fails the job that needed it, and nothing else. The lack of room is made by a hook that raises torch's error."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize
from tests.support.full import MODEL, full_driver, full_model
from torch import Tensor, nn

from gradstream.engine.models.base import BaseModel
from gradstream.engine.optim import _elements
from gradstream.shared.wire import AdamParams, Failed, OptimStep, Outcome

DATA = random_data([9, 4])
ERROR = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"


def lack(*_: object) -> Tensor:
    raise torch.OutOfMemoryError(ERROR)


@contextmanager
def no_room(base: BaseModel, where: str) -> Iterator[None]:
    layer: nn.Module = base.causal_lm.get_submodule("model.layers.0.mlp")
    hook = layer.register_forward_hook(lack) if where == "forward" else layer.register_full_backward_hook(lack)
    try:
        yield
    finally:
        hook.remove()


def no_room_failure(outcome: Outcome) -> str:
    assert isinstance(outcome, Failed)
    assert (outcome.code, outcome.category) == ("out_of_memory", "server")
    assert "Tried to allocate" not in outcome.message
    return outcome.message


@pytest.mark.parametrize("num_before", [0, 1])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_over_full_weights_leaves_the_accumulator_as_it_was(where: str, num_before: int) -> None:
    driver, twin = full_driver(), full_driver()
    for one in (driver, twin):
        for seed in range(num_before):
            one.done(MODEL, cross_entropy(random_data([7], seed=seed)))
    with no_room(driver.engine.state.base, where):
        (outcome,) = driver.run((MODEL, cross_entropy(DATA)))
    assert no_room_failure(outcome).startswith("forward_backward: the device has no room for it")
    assert all(parameter.grad is None for parameter in driver.engine.state.base.causal_lm.parameters())
    assert driver.done(MODEL, cross_entropy(DATA)) == twin.done(MODEL, cross_entropy(DATA))
    assert torch.equal(driver.grad(MODEL), twin.grad(MODEL))
    assert full_model(driver.engine).valid_tokens == full_model(twin.engine).valid_tokens


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_of_adapters_fails_the_jobs_that_shared_it(where: str) -> None:
    driver = Driver(open_engine())
    for name in ("a", "b"):
        driver.create(name)
        randomize(driver, name)
    expected = driver.done("a", cross_entropy(DATA))
    before = driver.grad("a")
    with no_room(driver.engine.state.base, where):
        outcomes = driver.run(("a", cross_entropy(DATA)), ("b", cross_entropy(DATA)))
    assert len([no_room_failure(outcome) for outcome in outcomes]) == 2
    assert torch.equal(driver.grad("a"), before)
    assert not driver.grad("b").any()
    assert driver.done("a", cross_entropy(DATA)) == expected


def test_an_update_that_finds_no_room_has_stored_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, twin = full_driver(), full_driver()
    step = OptimStep(adam=AdamParams(learning_rate=1e-2))
    for one in (driver, twin):
        one.done(MODEL, cross_entropy(DATA))
    with monkeypatch.context() as patch:
        patch.setattr(_elements, "stored", lack)
        (outcome,) = driver.run((MODEL, step))
    assert no_room_failure(outcome).startswith("optim_step: ")
    assert driver.done(MODEL, step) == twin.done(MODEL, step)
    assert torch.equal(driver.weights(MODEL), twin.weights(MODEL))
