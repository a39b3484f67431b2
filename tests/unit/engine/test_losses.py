"""What every loss promises, and each loss's own formula."""

import numpy as np
import pytest
import torch
from tests.support.engine_builders import Driver, open_engine, randomize
from torch.autograd import gradcheck

from gradstream.engine import losses
from gradstream.engine.losses._base import LOSSES, TARGETS, LossArguments, evaluate
from gradstream.engine.registry import import_siblings
from gradstream.shared.columns import Column
from gradstream.shared.wire import Failed, ForwardBackward, ForwardBackwardDone

import_siblings(losses)
NAMES = sorted(LOSSES)
SWITCH = {"weights", "advantages"}


def _arguments(name: str, *, candidates: int = 1, seed: int = 0) -> LossArguments:
    """Arguments in float64 with both signs, and tokens 2 and 5 switched off."""
    generator = torch.Generator().manual_seed(seed)
    card = LOSSES[name].card
    inputs = {}
    for spec in card.inputs:
        if spec.name == TARGETS:
            continue
        values = torch.randn(8, candidates, dtype=torch.float64, generator=generator)
        if spec.name in SWITCH:
            values[[2, 5]] = 0.0
        if spec.name == "logprobs":
            values = -values.abs()
        inputs[spec.name] = values
    logprobs = -torch.randn(8, candidates, dtype=torch.float64, generator=generator).abs()
    params = {spec.name: float(spec.default) for spec in card.params if spec.default is not None}
    return LossArguments(logprobs_TC=logprobs, inputs=inputs, params=params, lengths=[5, 3])


def _with_logprobs(arguments: LossArguments, logprobs: torch.Tensor) -> LossArguments:
    return LossArguments(
        logprobs_TC=logprobs, inputs=arguments.inputs, params=arguments.params, lengths=arguments.lengths
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_the_registered_name_and_asks_for_targets(name: str) -> None:
    card = LOSSES[name].card
    assert card.name == name
    assert TARGETS in [spec.name for spec in card.inputs]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cispo"])
def test_the_gradient_equals_finite_differences(name: str) -> None:
    arguments = _arguments(name)
    leaf = arguments.logprobs_TC.clone().requires_grad_()
    assert gradcheck(lambda values: LOSSES[name].compute(_with_logprobs(arguments, values)).sum(), (leaf,))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_is_off_gives_exactly_zero_whatever_its_log_probability(name: str, bad: float) -> None:
    arguments = _arguments(name)
    logprobs = arguments.logprobs_TC.clone()
    logprobs[[2, 5]] = bad
    result = evaluate(LOSSES[name], _with_logprobs(arguments, logprobs), with_grad=True)
    assert result.grad_TC is not None
    assert (result.elementwise_TC[[2, 5]] == 0).all()
    assert (result.grad_TC[[2, 5]] == 0).all()
    assert result.elementwise_TC.isfinite().all()
    assert result.grad_TC.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_sum_over_tokens_not_a_mean(name: str) -> None:
    arguments = _arguments(name)
    twice = LossArguments(
        logprobs_TC=torch.cat([arguments.logprobs_TC] * 2),
        inputs={key: torch.cat([values] * 2) for key, values in arguments.inputs.items()},
        params=arguments.params,
        lengths=arguments.lengths * 2,
    )
    once = evaluate(LOSSES[name], arguments, with_grad=False).elementwise_TC.sum()
    assert float(evaluate(LOSSES[name], twice, with_grad=False).elementwise_TC.sum()) == pytest.approx(2 * float(once))


def test_cross_entropy_is_minus_weight_times_log_probability() -> None:
    arguments = _arguments("cross_entropy", candidates=3)
    got = evaluate(LOSSES["cross_entropy"], arguments, with_grad=True)
    torch.testing.assert_close(got.elementwise_TC, -arguments.inputs["weights"] * arguments.logprobs_TC)
    torch.testing.assert_close(got.grad_TC, -arguments.inputs["weights"])


def test_importance_sampling_is_minus_ratio_times_advantage() -> None:
    arguments = _arguments("importance_sampling")
    got = evaluate(LOSSES["importance_sampling"], arguments, with_grad=False).elementwise_TC
    ratio = (arguments.logprobs_TC - arguments.inputs["logprobs"]).exp()
    torch.testing.assert_close(got, -ratio * arguments.inputs["advantages"])


def test_ppo_takes_the_smaller_of_the_clipped_and_the_plain_term() -> None:
    arguments = _arguments("ppo")
    got = evaluate(LOSSES["ppo"], arguments, with_grad=False).elementwise_TC
    ratio = (arguments.logprobs_TC - arguments.inputs["logprobs"]).exp().numpy()
    advantages = arguments.inputs["advantages"].numpy()
    want = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.2) * advantages)
    np.testing.assert_allclose(got.numpy(), want)


def test_cispo_weights_the_log_probability_by_a_constant_ratio() -> None:
    arguments = _arguments("cispo")
    got = evaluate(LOSSES["cispo"], arguments, with_grad=True)
    ratio = (arguments.logprobs_TC - arguments.inputs["logprobs"]).exp().clamp(0.0, 4.0)
    torch.testing.assert_close(got.grad_TC, -ratio * arguments.inputs["advantages"])
    torch.testing.assert_close(got.elementwise_TC, got.grad_TC * arguments.logprobs_TC)


@pytest.mark.parametrize("config", [{"clip_low_threshold": -0.1}, {"clip_high_threshold": "wide"}])
def test_a_parameter_out_of_bounds_is_refused_by_name(config: dict[str, float | str]) -> None:
    driver = Driver(open_engine())
    driver.create("m")
    columns = {
        "target_tokens": Column.of([np.array([1, 2])], dtype="int64"),
        "logprobs": Column.of([np.array([-1.0, -2.0])], dtype="float32"),
        "advantages": Column.of([np.array([1.0, -1.0])], dtype="float32"),
    }
    tokens = Column.of([np.array([1, 2])], dtype="int32")
    (outcome,) = driver.run(("m", ForwardBackward(tokens=tokens, inputs=columns, loss_fn="ppo", loss_config=config)))
    assert isinstance(outcome, Failed)
    assert f"loss_fn_config.{next(iter(config))}" in outcome.message


def test_soft_targets_equal_one_job_per_candidate() -> None:
    driver = Driver(open_engine())
    for name in ("soft", "hard"):
        driver.create(name)
        randomize(driver, name)
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 2048, length) for length in (7, 4)]
    targets = [rng.integers(0, 2048, (length, 3)) for length in (7, 4)]
    weights = [rng.normal(size=(length, 3)).astype(np.float32) for length in (7, 4)]

    def job(pick: int | None) -> ForwardBackward:
        trailing = (3,) if pick is None else ()
        chosen = [[values if pick is None else values[:, pick] for values in arrays] for arrays in (targets, weights)]
        return ForwardBackward(
            tokens=Column.of(list(tokens), dtype="int32"),
            inputs={
                "target_tokens": Column.of(chosen[0], dtype="int64", trailing=trailing),
                "weights": Column.of(chosen[1], dtype="float32", trailing=trailing),
            },
            loss_fn="cross_entropy",
        )

    soft = driver.done("soft", job(None))
    hard = driver.run(*(("hard", job(pick)) for pick in range(3)))
    assert isinstance(soft, ForwardBackwardDone)
    assert soft.outputs["logprobs"].trailing == (3,)
    for pick, outcome in enumerate(hard):
        assert isinstance(outcome, ForwardBackwardDone)
        for wide, narrow in zip(soft.outputs["logprobs"].arrays(), outcome.outputs["logprobs"].arrays(), strict=True):
            np.testing.assert_allclose(wide[:, pick], narrow, atol=1e-5)
    torch.testing.assert_close(driver.grad("soft"), driver.grad("hard"), rtol=1e-4, atol=1e-4)
