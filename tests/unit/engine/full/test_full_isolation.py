"""Full weights: packing, batching and failed jobs change nothing that they should not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, MOE, Data, cross_entropy, logprobs_of, loss_of, random_data
from tests.support.full import MODEL, full_driver, full_model
from tests.support.oracle import relative_error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradstream.engine import accumulation
from gradstream.shared.wire import Failed, ForwardBackwardDone


class LargeAllocations(TorchDispatchMode):
    """Names of the operations in the block that made a tensor of at least size numbers with memory of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self._size = size
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own signature
        given = {
            one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.numel() >= self._size:
                place = one.untyped_storage().data_ptr()
                if place not in given:
                    self.names.append(str(func))
        return result


def huge(data: Data) -> Data:
    """A gradient beyond float32, while each token's loss stays within."""
    data.weights[0][2] = 3e38
    return data


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_a_datums_numbers_do_not_depend_on_what_it_is_packed_with(path: Path) -> None:
    data = random_data([5, 33, 12, 12, 1, 20])
    together, apart = full_driver(path), full_driver(path, row_budget_tokens=1)
    outcomes = [driver.done(MODEL, cross_entropy(data)) for driver in (together, apart)]
    for left, right in zip(*map(logprobs_of, outcomes), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)
    assert loss_of(outcomes[0]) == pytest.approx(loss_of(outcomes[1]), rel=1e-5)
    assert relative_error(together.grad(MODEL), apart.grad(MODEL)) < 1e-5


def test_jobs_of_a_batch_give_the_bits_that_they_give_one_after_the_other() -> None:
    jobs = [cross_entropy(random_data([9 + 2 * seed, 14], seed=seed)) for seed in range(3)]
    together, apart = full_driver(), full_driver()
    outcomes = together.run(*((MODEL, job) for job in jobs))
    assert outcomes == [apart.done(MODEL, job) for job in jobs]
    assert torch.equal(together.grad(MODEL), apart.grad(MODEL))


def test_the_gradients_of_two_jobs_add_up() -> None:
    first, second, both = full_driver(), full_driver(), full_driver()
    jobs = [cross_entropy(random_data([11, 14], seed=seed)) for seed in range(2)]
    for driver, job in zip((first, second), jobs, strict=True):
        driver.done(MODEL, job)
    for job in jobs:
        both.done(MODEL, job)
    torch.testing.assert_close(
        both.grad(MODEL),
        first.grad(MODEL) + second.grad(MODEL),
        rtol=1e-5,
        atol=1e-7 * float(both.grad(MODEL).abs().max()),
    )


def test_a_failed_job_between_two_changes_no_bit_of_their_sum() -> None:
    plain, disturbed = full_driver(), full_driver()
    jobs = [cross_entropy(random_data([11, 14], seed=seed)) for seed in range(2)]
    for driver in (plain, disturbed):
        driver.done(MODEL, jobs[0])
        if driver is disturbed:
            (outcome,) = driver.run((MODEL, cross_entropy(huge(random_data([6], seed=9)))))
            assert isinstance(outcome, Failed)
        driver.done(MODEL, jobs[1])
    assert torch.equal(plain.grad(MODEL), disturbed.grad(MODEL))


@pytest.mark.parametrize("num_before", [0, 2])
def test_no_job_allocates_a_gradient_on_the_device(num_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # So that the stretches that are looked at for infinities are small beside this tiny model.
    monkeypatch.setattr(accumulation, "_CHUNK", 1 << 12)
    driver = full_driver()
    for seed in range(num_before):
        driver.done(MODEL, cross_entropy(random_data([9], seed=seed)))
    size = full_model(driver.engine).grad.numel()
    with LargeAllocations(size) as seen:
        driver.done(MODEL, cross_entropy(random_data([9, 4])))
    # What is kept for the case that the job fails lies in host memory.
    assert seen.names == (["aten.empty.memory_format"] if num_before else [])


@pytest.mark.parametrize("is_first", [True, False], ids=["nothing accumulated", "something accumulated"])
def test_a_job_whose_gradient_is_not_finite_changes_nothing(is_first: bool) -> None:
    driver = full_driver()
    if not is_first:
        driver.done(MODEL, cross_entropy(random_data([9])))
    model = full_model(driver.engine)
    grad, facts = driver.grad(MODEL), (model.has_grad, model.valid_tokens)

    (outcome,) = driver.run((MODEL, cross_entropy(huge(random_data([6], seed=9)))))

    assert isinstance(outcome, Failed)
    assert outcome.code == "non_finite"
    assert torch.equal(driver.grad(MODEL), grad)
    assert (model.has_grad, model.valid_tokens) == facts


def test_a_sum_of_gradients_that_is_not_finite_fails_the_job_that_made_it_so() -> None:
    driver = full_driver()
    data = random_data([6], seed=9)
    data.weights[0] *= np.float32(1e34)
    driver.done(MODEL, cross_entropy(data))
    full_model(driver.engine).grad.fill_(torch.finfo(torch.float32).max)
    before = driver.grad(MODEL)
    (outcome,) = driver.run((MODEL, cross_entropy(data)))
    assert isinstance(outcome, Failed)
    assert "accumulated gradient" in outcome.message
    assert torch.equal(driver.grad(MODEL), before)
    assert full_model(driver.engine).has_grad


def test_a_failed_job_does_not_touch_its_neighbours_in_the_batch() -> None:
    good = cross_entropy(random_data([9, 4]))
    alone, beside = full_driver(), full_driver()
    expected = alone.done(MODEL, good)
    outcomes = beside.run(
        (MODEL, cross_entropy(huge(random_data([6])))), (MODEL, good), (MODEL, cross_entropy(huge(random_data([7]))))
    )
    assert [isinstance(outcome, Failed) for outcome in outcomes] == [True, False, True]
    assert outcomes[1] == expected
    assert torch.equal(beside.grad(MODEL), alone.grad(MODEL))


def test_a_forward_changes_nothing_and_gives_the_numbers_of_a_forward_backward() -> None:
    driver = full_driver()
    data = random_data([9, 4])
    forward = driver.done(MODEL, cross_entropy(data, backward=False))
    assert not full_model(driver.engine).has_grad
    assert not driver.grad(MODEL).any()
    trained = driver.done(MODEL, cross_entropy(data))
    assert isinstance(forward, ForwardBackwardDone)
    assert isinstance(trained, ForwardBackwardDone)
    assert forward.outputs == trained.outputs
    assert forward.metrics == trained.metrics


def test_no_parameter_keeps_a_gradient_of_its_own() -> None:
    driver = full_driver()
    driver.done(MODEL, cross_entropy(random_data([9, 4])))
    assert all(parameter.grad is None for parameter in driver.engine.state.base.causal_lm.parameters())
