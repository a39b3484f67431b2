"""Merged adapters against double precision: what they compute, their gradients, and whole runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    Driver,
    create,
    cross_entropy,
    logprobs_of,
    open_engine,
    random_data,
    randomize,
)
from tests.support.oracle import assert_true_cross_entropy, relative_error
from tests.support.relora import ADAM, TorchReLora, adapter_of, merging_driver, train

from gradstream.engine.config import DTypePolicy
from gradstream.shared.wire import AdamParams, Failed, OptimStep, OptimStepDone

FAMILIES = ["qwen3", "llama", "qwen3_moe"]
pytestmark = pytest.mark.config_field("merge_lora_interval")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_leaves_what_the_model_computes_and_begins_with_fresh_factors(
    family: str, model_path: Callable[[str], Path]
) -> None:
    merged, plain = merging_driver(model_path(family)), Driver(open_engine(model_path(family)))
    for driver in (merged, plain):
        driver.create("m", rank=4)
        train(driver, range(2))
    adapter, other = adapter_of(merged), adapter_of(plain)
    assert (adapter.num_merges, adapter.factors.layout.rank, adapter.layout.rank) == (1, 8, 4)
    assert torch.equal(adapter.frozen_factors(), other.weights)
    for (name, pair), first in zip(
        adapter.named_views(adapter.weights).items(), other.named_views(other.weights).values(), strict=True
    ):
        assert not pair.b.any(), name
        assert pair.a.any(), name
        assert not torch.equal(pair.a, first.a), name

    data = cross_entropy(random_data([20, 9], seed=50), backward=False)
    for got, want in zip(logprobs_of(merged.done("m", data)), logprobs_of(plain.done("m", data)), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_of_a_model_merged_twice_equal_double_precision(
    family: str, model_path: Callable[[str], Path]
) -> None:
    path = model_path(family)
    driver = merging_driver(path, interval=1)
    driver.create("m", rank=3)
    driver.row_budget_tokens = 50
    for number in range(2):
        randomize(driver, "m", seed=number, std=0.03)
        adapter_of(driver).sync()
        train(driver, range(number, number + 1))
    adapter = adapter_of(driver)
    randomize(driver, "m", std=0.03)
    adapter.sync()
    assert adapter.num_merges == 2
    data = random_data([5, 33, 12, 1, 20])

    outcome = driver.done("m", cross_entropy(data))

    assert_true_cross_entropy(path, adapter, data, outcome, atol=3e-5)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_models_of_different_numbers_of_merges_in_one_pass_have_the_gradients_that_each_has_alone(
    family: str, model_path: Callable[[str], Path]
) -> None:
    driver = merging_driver(model_path(family))
    counts = {"twice": 4, "twice too": 4, "once": 2, "never": 1}
    for seed, (model, steps) in enumerate(counts.items()):
        driver.create(model, rank=4, seed=seed)
        train(driver, range(steps), model)
        randomize(driver, model, seed=seed, std=0.03)
        adapter_of(driver, model).sync()
    assert [adapter_of(driver, model).num_merges for model in counts] == [2, 2, 1, 0]
    jobs = [(model, cross_entropy(random_data([16, 9], seed=number))) for number, model in enumerate(counts)]
    driver.run(*jobs)
    together = [driver.grad(model) for model in counts]
    for model in counts:
        adapter_of(driver, model).clear_grad()
    for (model, job), got in zip(jobs, together, strict=True):
        driver.done(model, job)
        assert relative_error(got, driver.grad(model)) < 1e-5, model


@pytest.mark.config_field("reset_optimizer_on_merge")
@pytest.mark.parametrize("resets", [False, True], ids=["state kept", "state reset"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_seven_steps_with_merges_equal_a_torch_loop_that_merges_into_the_weights(
    family: str, resets: bool, model_path: Callable[[str], Path]
) -> None:
    path = model_path(family)
    driver = merging_driver(path, resets=resets)
    driver.create("m", rank=4)
    reference = TorchReLora(path, adapter_of(driver), interval=2, resets=resets)
    for number in range(7):
        want = reference.train(random_data([12, 7, 30], seed=number))
        assert train(driver, range(number, number + 1)) == [pytest.approx(want, rel=2e-5, abs=2e-4)]
    adapter = adapter_of(driver)
    assert adapter.num_merges == reference.num_merges == 3
    for name, pair in adapter.named_views(adapter.weights).items():
        assert relative_error(pair.a, reference.pairs[name].a.detach()) < 1e-3, name
        assert relative_error(pair.b, reference.pairs[name].b.detach()) < 1e-3, name


@pytest.mark.config_field("reset_optimizer_on_merge")
def test_the_optimizer_begins_anew_after_a_merge_only_where_that_is_asked_for() -> None:
    kept, reset = merging_driver(), merging_driver(resets=True)
    for driver in (kept, reset):
        driver.create("m", rank=4)
        train(driver, range(2))
    assert adapter_of(kept).exp_avg.any()
    assert adapter_of(kept).optim_began == 0
    assert not adapter_of(reset).exp_avg.any()
    assert not adapter_of(reset).exp_avg_sq.any()
    assert (adapter_of(reset).step, adapter_of(reset).optim_began) == (2, 2)
    # The first step after it has the bias correction of a first step: each weight with a gradient goes about a learning rate.
    before = adapter_of(reset).weights.clone()
    reset.done("m", cross_entropy(random_data([30], seed=3)))
    reset.step("m", learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-12)
    moved = (adapter_of(reset).weights - before).abs()
    torch.testing.assert_close(moved[moved > 0].median(), torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_in_bfloat16_a_merge_leaves_what_the_model_computes_up_to_rounding() -> None:
    merged, plain = merging_driver(dtype=DTypePolicy.BFLOAT16), Driver(open_engine(dtype=DTypePolicy.BFLOAT16))
    for driver in (merged, plain):
        driver.create("m", rank=4)
        train(driver, range(2))
    data = cross_entropy(random_data([20, 9], seed=50))
    got, want = (logprobs_of(driver.done("m", data)) for driver in (merged, plain))
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.15)
    adapter = adapter_of(merged)
    grads = adapter.named_views(adapter.grad).values()
    # b is zero, so only its gradient is not.
    assert all(pair.b.any() and not pair.a.any() for pair in grads)


def test_each_model_is_merged_by_its_own_steps_and_only_those_that_were_made() -> None:
    driver = merging_driver()
    driver.create("a", rank=4)
    driver.create("b", rank=4)
    train(driver, range(1), "a")
    (refused,) = driver.run(("a", OptimStep(adam=AdamParams(learning_rate=float("nan")))))
    assert isinstance(refused, Failed)
    train(driver, range(1), "b")
    assert (adapter_of(driver, "a").num_merges, adapter_of(driver, "b").num_merges) == (0, 0)
    outcome = driver.step("a", **ADAM)
    assert isinstance(outcome, OptimStepDone)
    assert (outcome.metrics["step"], outcome.metrics["merges"]) == (2, 1)
    assert adapter_of(driver, "b").num_merges == 0


def test_the_metrics_and_bits_of_a_server_that_does_not_merge_are_as_ever() -> None:
    driver = Driver(open_engine())
    driver.create("m", rank=4)
    outcome = driver.step("m", **ADAM)
    assert isinstance(outcome, OptimStepDone)
    assert set(outcome.metrics) == {"grad_norm", "lr", "step"}
    assert adapter_of(driver).factors.weights is adapter_of(driver).weights


@pytest.mark.config_field("max_merged_lora_rank")
def test_a_step_whose_merge_would_exceed_the_highest_rank_fails_and_changes_nothing() -> None:
    driver = merging_driver(interval=1, max_rank=11)
    driver.create("m", rank=4)
    train(driver, range(1))
    driver.done("m", cross_entropy(random_data([12])))
    adapter = adapter_of(driver)
    before = [adapter.weights.clone(), adapter.factors.weights.clone(), adapter.grad.clone(), adapter.exp_avg.clone()]
    (failed,) = driver.run(("m", OptimStep(adam=AdamParams(**ADAM))))
    assert isinstance(failed, Failed)
    assert "make its rank 12, above max_merged_lora_rank: 11; no step was made" in failed.message
    assert adapter.step == 1
    after = [adapter.weights, adapter.factors.weights, adapter.grad, adapter.exp_avg]
    assert all(map(torch.equal, before, after))


@pytest.mark.config_field("max_merged_lora_rank")
def test_a_rank_without_room_for_one_merge_is_refused_at_creation() -> None:
    driver = merging_driver(max_rank=11)
    (failed,) = driver.run(("m", create(rank=6)))
    assert isinstance(failed, Failed)
    assert "lora.rank: 6 has no room for a merge, which makes it 12" in failed.message
