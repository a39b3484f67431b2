"""Tokens whose target is IGNORE: no loss sees them, for every loss, for adapters and for full weights."""

import dataclasses
from collections.abc import Callable

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
)
from tests.support.full import MODEL, Twin, create_full, full_driver, named
from tests.support.loss_oracles import CASES, arguments_of, case_name, true_loss
from tests.support.oracle import relative_error

from gradstream.engine.datums import datums_of
from gradstream.engine.losses._base import LOSSES, LossArguments
from gradstream.engine.losses._valid import evaluate_valid, measure_valid
from gradstream.shared.columns import Column
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import IGNORE, CreateModel, Failed, ForwardBackward, ForwardBackwardDone

# Of two datums of 5 and 3 tokens.
PATTERNS = {
    "a prompt": [0, 0, 1, 1, 1, 1, 1, 1],
    "the ends": [1, 1, 1, 1, 0, 0, 1, 1],
    "a whole datum": [0, 0, 0, 0, 0, 1, 0, 1],
    "all but one": [0, 0, 0, 0, 0, 0, 1, 0],
}
every_case = pytest.mark.parametrize(("name", "config"), CASES, ids=case_name)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


def without(arguments: LossArguments, is_valid: np.ndarray) -> LossArguments:
    """The datums as a client would send them that cuts the tokens out."""
    parts = np.split(is_valid, np.cumsum(arguments.lengths)[:-1])
    keep = torch.tensor(is_valid)
    return dataclasses.replace(
        arguments,
        logprobs_TC=arguments.logprobs_TC[keep],
        held_TC=arguments.held_TC[keep],
        inputs={name: values[keep] for name, values in arguments.inputs.items()},
        lengths=[int(part.sum()) for part in parts if part.any()],
    )


def spoiled(arguments: LossArguments, is_valid: np.ndarray) -> LossArguments:
    """The same arguments with numbers at the other tokens that would break every formula."""
    bad = torch.tensor(~is_valid)[:, None]
    logprobs = arguments.logprobs_TC.masked_fill(bad, float("nan"))
    inputs = {name: values.masked_fill(bad, float("inf")) for name, values in arguments.inputs.items()}
    return dataclasses.replace(arguments, logprobs_TC=logprobs, held_TC=logprobs.detach(), inputs=inputs)


@every_pattern
@every_case
def test_every_loss_is_that_of_the_tokens_with_a_target_alone(name: str, config: dict, pattern: list[int]) -> None:
    is_valid = np.array(pattern, dtype=bool)
    arguments = arguments_of(name, config)
    result = evaluate_valid(LOSSES[name], spoiled(arguments, is_valid), is_valid, with_grad=True)

    alone = without(arguments, is_valid)
    leaf = alone.logprobs_TC.clone().requires_grad_()
    want = true_loss(name, dataclasses.replace(alone, held_TC=alone.logprobs_TC.detach()), leaf)
    want.backward()
    keep = torch.tensor(is_valid)
    torch.testing.assert_close(result.elementwise_TC.sum(), want.detach(), rtol=1e-12, atol=1e-12)
    assert result.grad_TC is not None
    torch.testing.assert_close(result.grad_TC[keep], leaf.grad, rtol=1e-12, atol=1e-12)
    assert not result.elementwise_TC[~keep].any()
    assert not result.grad_TC[~keep].any()


@every_pattern
@every_case
def test_metrics_are_of_the_tokens_with_a_target(name: str, config: dict, pattern: list[int]) -> None:
    is_valid = np.array(pattern, dtype=bool)
    arguments = arguments_of(name, config)
    alone = without(arguments, is_valid)
    measure = LOSSES[name].measure
    want = {} if measure is None else measure(dataclasses.replace(alone, held_TC=alone.logprobs_TC))
    assert measure_valid(LOSSES[name], spoiled(arguments, is_valid), is_valid) == want


@every_case
def test_datums_without_any_target_have_loss_zero_and_no_metrics(name: str, config: dict) -> None:
    nothing = np.zeros(8, dtype=bool)
    arguments = spoiled(arguments_of(name, config), nothing)
    result = evaluate_valid(LOSSES[name], arguments, nothing, with_grad=True)
    assert result.grad_TC is not None
    assert not result.elementwise_TC.any()
    assert not result.grad_TC.any()
    assert measure_valid(LOSSES[name], arguments, nothing) == {}


Make = Callable[[str], Driver]


@pytest.fixture(params=["lora", "full"])
def make(request: pytest.FixtureRequest) -> Make:
    """A driver with a model of the kind, whose updates are made of the reduction."""

    def driver(reduction: str) -> Driver:
        if request.param == "full":
            return full_driver(reduction=reduction, row_budget_tokens=40)
        made = Driver(open_engine(), row_budget_tokens=40)
        lora = create().lora
        made.done(MODEL, CreateModel(session_id="s", base_model="tiny", lora=lora, reduction=reduction))
        return made

    return driver


def masked(data: Data, masks: list[list[int]]) -> Data:
    """The data with IGNORE where a mask is 0, and its weights all 1."""
    targets = [np.where(mask, target, IGNORE) for mask, target in zip(masks, data.targets, strict=True)]
    return Data(data.tokens, targets, [np.ones_like(weights) for weights in data.weights])


MASKS = [[0] * 9 + [1] * 11, [1, 0, 1, 1, 0, 1, 0], [0] * 5, [1] * 12]
LENGTHS = [20, 7, 5, 12]


def test_ignored_targets_are_like_weights_of_zero(make: Make) -> None:
    data = masked(random_data(LENGTHS), MASKS)
    plain = random_data(LENGTHS)
    plain.weights = [np.array(mask, dtype=np.float32) for mask in MASKS]
    ignored, weighted = make("sum"), make("sum")
    outcomes = ignored.done(MODEL, cross_entropy(data)), weighted.done(MODEL, cross_entropy(plain))
    assert loss_of(outcomes[0]) == loss_of(outcomes[1])
    assert torch.equal(ignored.grad(MODEL), weighted.grad(MODEL))
    for left, right, mask in zip(*map(logprobs_of, outcomes), MASKS, strict=True):
        np.testing.assert_array_equal(left, np.where(mask, right, np.float32(0.0)))


def test_metrics_of_a_token_mean_model_tell_the_mean_and_the_tokens(make: Make) -> None:
    driver = make("token_mean")
    outcome = driver.done(MODEL, cross_entropy(masked(random_data(LENGTHS), MASKS)))
    assert isinstance(outcome, ForwardBackwardDone)
    num_valid = sum(map(sum, MASKS))
    assert outcome.metrics["valid_tokens:sum"] == num_valid
    assert outcome.metrics["loss:mean"] == outcome.metrics["loss:sum"] / num_valid
    assert driver.engine.capture([MODEL])[0].valid_tokens == num_valid
    driver.done(MODEL, cross_entropy(random_data([4])))
    driver.done(MODEL, cross_entropy(random_data([40]), backward=False))
    assert driver.engine.capture([MODEL])[0].valid_tokens == num_valid + 4
    driver.step(MODEL)
    assert driver.engine.capture([MODEL])[0].valid_tokens == 0


def test_the_metrics_of_a_sum_model_are_what_they_were(make: Make) -> None:
    outcome = make("sum").done(MODEL, cross_entropy(random_data([4])))
    assert isinstance(outcome, ForwardBackwardDone)
    assert set(outcome.metrics) == {"loss:sum"}


@pytest.mark.parametrize("backward", [True, False])
def test_a_job_without_any_target_is_refused_by_a_mean_and_harmless_to_a_sum(make: Make, backward: bool) -> None:
    nothing = cross_entropy(masked(random_data([5, 2]), [[0] * 5, [0] * 2]), backward=backward)
    (refused,) = make("token_mean").run((MODEL, nothing))
    assert isinstance(refused, Failed)
    assert "every target is -100" in refused.message
    driver = make("sum")
    outcome = driver.done(MODEL, nothing)
    assert loss_of(outcome) == 0.0
    assert not driver.grad(MODEL).any()
    assert not any(row.any() for row in logprobs_of(outcome))


def test_a_step_of_a_token_mean_model_is_torch_adamw_on_the_mean_over_all_of_its_jobs() -> None:
    driver = full_driver(reduction="token_mean", row_budget_tokens=16)
    jobs = [random_data([14, 9], seed=1), random_data([30], seed=2)]
    masks = [[[0] * 6 + [1] * 8, [1] * 9], [[1] * 3 + [0] * 27]]
    twin = Twin(driver.engine.state.config.model_path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(list(twin.trained().values()), lr=1e-3, betas=(0.9, 0.95), eps=1e-6, weight_decay=0)
    for _ in range(3):
        for data, mask in zip(jobs, masks, strict=True):
            driver.done(MODEL, cross_entropy(masked(data, mask)))
        driver.step(MODEL, learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-6)
        losses = []
        for data, mask in zip(jobs, masks, strict=True):
            data.weights = [np.array(one, dtype=np.float32) for one in mask]
            losses.append(twin.loss(data))
        (torch.stack(losses).sum() / 20).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = named(driver, driver.weights(MODEL))
    for name, parameter in twin.trained().items():
        assert relative_error(weights[name], parameter.detach()) < 1e-4, name


def test_all_targets_of_a_token_are_ignored_or_none() -> None:
    tokens = Column.of([np.arange(3, dtype=np.int32)], dtype="int32")

    def payload(targets: list[list[int]]) -> ForwardBackward:
        column = Column.of([np.array(targets)], dtype="int64", trailing=(2,))
        return ForwardBackward(tokens=tokens, inputs={"target_tokens": column}, loss_fn="cross_entropy")

    found = datums_of(payload([[1, 2], [IGNORE, IGNORE], [3, 4]]), vocab_size=9, max_tokens=9)
    assert found.num_valid == 2
    assert found.targets_NC.tolist() == [[1, 2], [0, 0], [3, 4]]
    with pytest.raises(InvalidRequest, match="some targets of token 2 of the call are -100"):
        datums_of(payload([[1, 2], [IGNORE, IGNORE], [IGNORE, 4]]), vocab_size=9, max_tokens=9)
    with pytest.raises(InvalidRequest, match="token id -99 is outside the vocabulary"):
        datums_of(payload([[1, 2], [IGNORE, IGNORE], [-99, 4]]), vocab_size=9, max_tokens=9)


def test_a_full_weight_model_takes_its_reduction_from_its_making() -> None:
    driver = Driver(open_engine(is_lora=False))
    driver.done(MODEL, create_full(reduction="token_mean"))
    assert driver.engine.capture([MODEL])[0].reduction == "token_mean"
