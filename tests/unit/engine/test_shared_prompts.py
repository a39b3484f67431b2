"""Prompts that are computed once: the losses, outputs and gradients of every datum for itself."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    DENSE,
    MOE,
    VOCAB,
    Data,
    Driver,
    cross_entropy,
    logprobs_of,
    loss_of,
    open_engine,
    randomize,
)
from tests.support.full import MODEL, Twin, full_driver, named
from tests.support.oracle import assert_true_cross_entropy, relative_error
from tests.support.prompts import num_unshared, prompt_data

from gradstream.engine.config import Memory
from gradstream.engine.losses._base import LOSSES, TARGETS
from gradstream.engine.models.base import BaseModel
from gradstream.shared.columns import Column
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import IGNORE, ForwardBackward

pytestmark = pytest.mark.config_field("shared_prompt_tokens")

# Two prompts behind one opening, completions of equal and of other lengths, and a datum that shares nothing.
GROUPS = [(20, [7, 7, 3, 12]), (11, [5, 1, 5])]
ATTENTIONS = ["reference", "segment_sdpa"]


def data_of(seed: int = 0) -> Data:
    """The same again: a datum twice, and one that is the beginning of others."""
    data, other = prompt_data(GROUPS, system=18, seed=seed), prompt_data([(9, [4])], seed=seed + 50)
    tokens = [*data.tokens, other.tokens[0], data.tokens[1], data.tokens[0][:38]]
    rng = np.random.default_rng(seed)
    return Data(
        tokens,
        [rng.integers(0, VOCAB, len(own)) for own in tokens],
        [rng.normal(size=len(own)).astype(np.float32) for own in tokens],
    )


def driver_of(path: Path = DENSE, *, share: int = 8, budget: int = 8192, **changes: object) -> Driver:
    driver = Driver(open_engine(path, **changes), row_budget_tokens=budget)
    driver.shared_prompt_tokens = share
    for seed, model in enumerate("ab"):
        driver.create(model, rank=4, seed=seed)
        randomize(driver, model, seed=seed)
    return driver


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass from now on computes."""
    computed = []
    packed = BaseModel.packed

    def count(self, lengths, parents=None):
        computed.append(sum(lengths))
        return packed(self, lengths, parents)

    monkeypatch.setattr(BaseModel, "packed", count)
    return computed


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe"])
def test_losses_and_every_gradient_equal_double_precision(
    family: str, attention: str, model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model_path(family)
    driver = driver_of(path, attention=attention)
    adapter = driver.engine.state.models[ModelId("a")]
    data = data_of()
    computed = counting(monkeypatch)

    outcome = driver.done("a", cross_entropy(data))

    assert computed == [18 + 20 + 29 + 7 + 11 + 11 + 13]
    assert_true_cross_entropy(path, adapter, data, outcome, loss_atol=1e-3)


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
def test_full_weights_get_the_gradients_of_double_precision(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = full_driver(path)
    driver.shared_prompt_tokens = 8
    data = data_of()
    computed = counting(monkeypatch)
    outcome = driver.done(MODEL, cross_entropy(data))
    assert sum(computed) < num_unshared(data) / 2
    twin = Twin(path)
    loss = twin.loss(data)
    loss.backward()
    assert loss_of(outcome) == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-3)
    got = named(driver, driver.grad(MODEL))
    for name, parameter in twin.trained().items():
        if name in got:
            assert relative_error(got[name], parameter.grad) < 5e-5, name


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
@pytest.mark.parametrize("budget", [8192, 60, 30])
def test_jobs_of_several_models_get_what_they_get_without(budget: int, isolate: bool, packing: str) -> None:
    found = []
    for share in (0, 8):
        driver = driver_of(share=share, budget=budget)
        driver.isolate_jobs, driver.packing = isolate, packing
        jobs = [cross_entropy(data_of(seed)) for seed in range(3)]
        outcomes = driver.run(*zip("aba", jobs, strict=True))
        found.append((list(map(logprobs_of, outcomes)), driver.grad("a"), driver.grad("b")))
    (plain, *grads), (shared, *others) = found
    for one, other in zip(plain, shared, strict=True):
        np.testing.assert_allclose(np.concatenate(other), np.concatenate(one), atol=2e-5, rtol=1e-5)
    for one, other in zip(grads, others, strict=True):
        assert relative_error(other, one) < 2e-5


def of_loss(name: str, data: Data) -> ForwardBackward:
    """Every input of a loss's card, different at every token of every datum."""
    rng = np.random.default_rng(3)
    card = LOSSES[name].card
    inputs = {TARGETS: Column.of(data.targets, dtype="int64")}
    for spec in card.inputs:
        if spec.name == TARGETS:
            continue
        values = [rng.normal(size=len(tokens)) for tokens in data.tokens]
        if spec.name.endswith("logprobs"):
            values = [-6 - np.abs(own) for own in values]
        if "_threshold" in spec.name:
            values = [np.abs(own) + (2 if "high" in spec.name else -2) for own in values]
        low = -np.inf if spec.minimum is None else spec.minimum
        high = np.inf if spec.maximum is None else spec.maximum
        values = [np.clip(own, low, high).astype(np.float32) for own in values]
        inputs[spec.name] = Column.of(values, dtype="float32")
    return ForwardBackward(
        tokens=Column.of(list(data.tokens), dtype="int32"), inputs=inputs, loss_fn=name, backward=True
    )


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_sees_the_fields_of_every_datum(name: str) -> None:
    found = []
    for share in (0, 8):
        driver = driver_of(share=share)
        outcome = driver.done("a", of_loss(name, data_of()))
        found.append((outcome, driver.grad("a")))
    (plain, grad), (shared, other) = found
    for output, values in plain.outputs.items():
        np.testing.assert_allclose(
            np.concatenate(shared.outputs[output].arrays()), np.concatenate(values.arrays()), atol=1e-4, rtol=1e-4
        )
    assert shared.metrics == pytest.approx(plain.metrics, rel=1e-4, abs=1e-3)
    assert grad.any()
    assert relative_error(other, grad) < 1e-4


def test_soft_targets_and_tokens_without_one_are_each_datums_own() -> None:
    data, rng = data_of(), np.random.default_rng(1)
    data.targets = [rng.integers(0, VOCAB, (len(tokens), 3)) for tokens in data.tokens]
    data.weights = [rng.normal(size=(len(tokens), 3)).astype(np.float32) for tokens in data.tokens]
    for number, targets in enumerate(data.targets):
        targets[: 15 + number] = IGNORE
    found = []
    for share in (0, 8):
        driver = driver_of(share=share)
        # Beside a job with a single target per token.
        soft = ForwardBackward(
            tokens=Column.of(list(data.tokens), dtype="int32"),
            inputs={
                TARGETS: Column.of(data.targets, dtype="int64", trailing=(3,)),
                "weights": Column.of(data.weights, dtype="float32", trailing=(3,)),
            },
            loss_fn="cross_entropy",
        )
        outcomes = driver.run(("a", soft), ("b", cross_entropy(data_of(1))))
        found.append((np.concatenate([part.ravel() for one in outcomes for part in logprobs_of(one)]), driver))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=2e-5, rtol=1e-5)
    for model in "ab":
        assert relative_error(found[1][1].grad(model), found[0][1].grad(model)) < 2e-5


def test_scoring_gives_the_log_probabilities_of_training_and_no_gradient() -> None:
    driver = driver_of()
    forward = driver.done("a", cross_entropy(data_of(), backward=False))
    assert not driver.engine.state.models[ModelId("a")].has_grad
    both = driver.done("a", cross_entropy(data_of()))
    np.testing.assert_array_equal(np.concatenate(logprobs_of(forward)), np.concatenate(logprobs_of(both)))


def test_the_same_plan_gives_the_same_bits_and_an_isolated_job_those_that_it_has_alone() -> None:
    found = []
    for others in ([], [], [("b", cross_entropy(data_of(1)))]):
        driver = driver_of(budget=90)
        driver.isolate_jobs = True
        outcomes = driver.run(*others, ("a", cross_entropy(data_of())))
        found.append((outcomes[-1], driver.grad("a")))
    for outcome, grad in found[1:]:
        assert outcome == found[0][0]
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize(
    "memory",
    [
        Memory(enable_gradient_checkpointing=True),
        Memory(enable_gradient_checkpointing=True, enable_reentrant=True),
        Memory(enable_activation_offload=True),
    ],
    ids=["recomputed", "reentrant", "offloaded"],
)
def test_what_is_kept_for_the_backward_pass_does_not_change_the_bits(memory: Memory) -> None:
    grads = []
    for own in (Memory(), memory):
        driver = driver_of(memory=own)
        driver.done("a", cross_entropy(data_of()))
        grads.append(driver.grad("a"))
    assert torch.equal(*grads)


@pytest.mark.parametrize("share", [0, 1000])
def test_short_prompts_leave_the_bits_as_they_were(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of()
    computed = counting(monkeypatch)
    driver = driver_of(share=share)
    computed.clear()
    driver.done("a", cross_entropy(data))
    assert computed == [num_unshared(data)]


def test_a_job_that_fails_beside_them_changes_nothing() -> None:
    driver = driver_of()
    alone = driver_of()
    driver.engine.state.models[ModelId("b")].weights.fill_(float("nan"))
    good, bad = driver.run(("a", cross_entropy(data_of())), ("b", cross_entropy(data_of(1))))
    want = alone.done("a", cross_entropy(data_of()))
    assert bad.code == "non_finite"
    assert loss_of(good) == pytest.approx(loss_of(want), rel=1e-5)
    assert relative_error(driver.grad("a"), alone.grad("a")) < 2e-5
