"""What every loss promises; a new loss joins by being registered, and has to bring an oracle and a docstring."""

import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from tests.support.engine_builders import Driver, open_engine, randomize
from tests.support.loss_oracles import CASES, OFF, ORACLES, arguments_of, case_name, true_loss
from torch.autograd import gradcheck

from gradstream.engine.losses._base import LOSSES, REFUSED, TARGETS, LossArguments, evaluate
from gradstream.shared.columns import Column
from gradstream.shared.wire import Failed, ForwardBackward, ForwardBackwardDone

NAMES = sorted(LOSSES)
METRIC = re.compile(r"[a-z0-9_]+:(mean|sum|min|max)")
every_case = pytest.mark.parametrize(("name", "config"), CASES, ids=case_name)


def with_logprobs(arguments: LossArguments, logprobs: torch.Tensor) -> LossArguments:
    return dataclasses.replace(arguments, logprobs_TC=logprobs, held_TC=logprobs.detach())


def test_every_loss_has_an_oracle() -> None:
    assert sorted(ORACLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_card_has_the_registered_name_and_asks_for_targets(name: str) -> None:
    card = LOSSES[name].card
    assert card.name == name
    assert card.inputs[0].name == TARGETS
    params = {param.name for param in card.params}
    assert {param.not_above for param in card.params} - {None} <= params
    for spec in card.inputs:
        assert {spec.fallback} - {None} <= params
        assert set(spec.required_by) <= params


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_states_formula_source_and_every_input_and_parameter_of_the_card(name: str) -> None:
    module = inspect.getmodule(LOSSES[name].compute)
    assert module is not None
    text = " ".join((module.__doc__ or "").split())
    for part in ("loss = ", "Inputs: ", "Parameters: ", "Source: ", *(spec.name for spec in LOSSES[name].card.inputs)):
        assert part in text
    stated = text.partition("Parameters: ")[2]
    for param in LOSSES[name].card.params:
        assert f"{param.name} {'off' if param.default is None else param.default}" in stated


@every_case
def test_value_and_gradient_equal_plain_autograd_over_the_formula(name: str, config: dict) -> None:
    for seed in range(4):
        arguments = arguments_of(name, config, seed=seed, candidates=3 if LOSSES[name].card.max_candidates > 1 else 1)
        result = evaluate(LOSSES[name], arguments, with_grad=True)
        leaf = arguments.logprobs_TC.clone().requires_grad_()
        want = true_loss(name, arguments, leaf)
        want.backward()
        torch.testing.assert_close(result.elementwise_TC.sum(), want.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result.grad_TC, leaf.grad, rtol=1e-12, atol=1e-12)


@every_case
def test_the_gradient_equals_finite_differences_with_what_is_held_held(name: str, config: dict) -> None:
    arguments = arguments_of(name, config)
    leaf = arguments.logprobs_TC.clone().requires_grad_()
    assert gradcheck(
        lambda values: LOSSES[name].compute(dataclasses.replace(arguments, logprobs_TC=values)).sum(), (leaf,)
    )


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@every_case
def test_a_token_that_is_off_gives_exactly_zero_whatever_its_log_probability(
    name: str, config: dict, bad: float
) -> None:
    arguments = arguments_of(name, config)
    logprobs = arguments.logprobs_TC.clone()
    logprobs[OFF] = bad
    result = evaluate(LOSSES[name], with_logprobs(arguments, logprobs), with_grad=True)
    assert result.grad_TC is not None
    assert (result.elementwise_TC[OFF] == 0).all()
    assert (result.grad_TC[OFF] == 0).all()
    assert result.elementwise_TC.isfinite().all()
    assert result.grad_TC.isfinite().all()


@every_case
def test_the_loss_is_a_sum_over_tokens_not_a_mean(name: str, config: dict) -> None:
    arguments = arguments_of(name, config)
    twice = LossArguments(
        logprobs_TC=torch.cat([arguments.logprobs_TC] * 2),
        held_TC=torch.cat([arguments.held_TC] * 2),
        inputs={key: torch.cat([values] * 2) for key, values in arguments.inputs.items()},
        params=arguments.params,
        lengths=arguments.lengths * 2,
    )
    once = evaluate(LOSSES[name], arguments, with_grad=False).elementwise_TC.sum()
    assert float(evaluate(LOSSES[name], twice, with_grad=False).elementwise_TC.sum()) == pytest.approx(2 * float(once))


@every_case
def test_a_datum_gives_the_same_bits_alone_and_behind_others(name: str, config: dict) -> None:
    arguments = arguments_of(name, config)
    first = arguments.lengths[0]
    alone = LossArguments(
        logprobs_TC=arguments.logprobs_TC[first:],
        held_TC=arguments.held_TC[first:],
        inputs={key: values[first:] for key, values in arguments.inputs.items()},
        params=arguments.params,
        lengths=arguments.lengths[1:],
    )
    packed = evaluate(LOSSES[name], arguments, with_grad=True)
    single = evaluate(LOSSES[name], alone, with_grad=True)
    assert packed.grad_TC is not None
    assert single.grad_TC is not None
    assert packed.elementwise_TC[first:].equal(single.elementwise_TC)
    assert packed.grad_TC[first:].equal(single.grad_TC)


@every_case
def test_metrics_are_those_of_the_card_with_a_reduction_the_sdk_knows(name: str, config: dict) -> None:
    loss = LOSSES[name]
    assert all(METRIC.fullmatch(metric) for metric in loss.card.metrics)
    assert (loss.measure is None) == (not loss.card.metrics)
    if loss.measure is None:
        return
    arguments = arguments_of(name, config)
    metrics = loss.measure(arguments)
    assert set(metrics) <= set(loss.card.metrics)
    assert {"ratio:mean", "k3:mean"} <= set(metrics)
    assert all(np.isfinite(list(metrics.values())))
    silent = {key: torch.zeros_like(values) for key, values in arguments.inputs.items()}
    assert loss.measure(dataclasses.replace(arguments, inputs=silent)) == {}


def test_thresholds_of_single_tokens_stand_in_for_those_of_the_call() -> None:
    for name in ("ppo", "cispo", "gspo"):
        arguments = arguments_of(name, {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0})
        narrow = arguments_of(name, {"clip_low_threshold": 0.99, "clip_high_threshold": 1.01})
        mixed = {key: values.clone() for key, values in arguments.inputs.items()}
        for key in ("clip_low_threshold", "clip_high_threshold"):
            mixed[key][:5] = narrow.inputs[key][:5]
        got = evaluate(LOSSES[name], dataclasses.replace(arguments, inputs=mixed), with_grad=False).elementwise_TC
        wide = evaluate(LOSSES[name], arguments, with_grad=False).elementwise_TC
        tight = evaluate(LOSSES[name], narrow, with_grad=False).elementwise_TC
        assert got[:5].equal(tight[:5])
        assert got[5:].equal(wide[5:])
        assert not tight.equal(wide)


def test_truncated_importance_weights_are_in_the_gradient() -> None:
    arguments = arguments_of("policy_loss", {"use_tis": 1.0, "tis_clip_low": 0.0, "tis_clip_high": 100.0})
    plain = dataclasses.replace(arguments, params={**arguments.params, "use_tis": 0.0})
    weighted = evaluate(LOSSES["policy_loss"], arguments, with_grad=True).grad_TC
    bare = evaluate(LOSSES["policy_loss"], plain, with_grad=True).grad_TC
    assert bare is not None
    gap = (arguments.inputs["logprobs"] - arguments.inputs["rollout_logprobs"]).exp()
    torch.testing.assert_close(weighted, gap * bare)
    assert bare.any()


def test_refused_losses_name_alternatives_and_are_not_registered() -> None:
    assert sorted(REFUSED) == ["custom", "stable_reinforce"]
    for name in REFUSED:
        assert name not in LOSSES
        assert REFUSED[name].startswith(f"loss_fn: '{name}'")
    assert "importance_sampling" in REFUSED["stable_reinforce"]
    assert "forward_backward_custom" in REFUSED["custom"]


def policy_job(loss_fn: str, config: dict[str, float | str], **extra: list[float]) -> ForwardBackward:
    """Two tokens of one datum."""
    columns = {
        "target_tokens": Column.of([np.array([1, 2])], dtype="int64"),
        "logprobs": Column.of([np.array([-1.0, -2.0])], dtype="float32"),
        "advantages": Column.of([np.array([1.0, -1.0])], dtype="float32"),
        **{name: Column.of([np.array(values)], dtype="float32") for name, values in extra.items()},
    }
    tokens = Column.of([np.array([1, 2])], dtype="int32")
    return ForwardBackward(tokens=tokens, inputs=columns, loss_fn=loss_fn, loss_config=config)


BAD = {
    "negative bound": (policy_job("ppo", {"clip_low_threshold": -0.1}), "loss_fn_config.clip_low_threshold: -0.1"),
    "text bound": (policy_job("ppo", {"clip_high_threshold": "wide"}), "clip_high_threshold: 'wide' is a text"),
    "crossed bounds": (policy_job("ppo", {"clip_low_threshold": 1.5}), "1.5 is above clip_high_threshold, 1.2"),
    "crossed bounds of a token": (
        policy_job("ppo", {}, clip_low_threshold=[0.5, 1.3]),
        "clip_low_threshold: 1.3 is above clip_high_threshold, 1.2, at token 1",
    ),
    "negative bound of a token": (
        policy_job("cispo", {}, clip_low_threshold=[0.5, -1.0]),
        "loss_fn_inputs.clip_low_threshold: holds -1.0",
    ),
    "mask above 1": (policy_job("gspo", {}, sequence_ratio_mask=[0.5, 2.0]), "sequence_ratio_mask: holds 2.0"),
    "no mask": (policy_job("gspo", {}), "sequence_ratio_mask is missing"),
    "tis without rollout": (policy_job("policy_loss", {"use_tis": 1.0}), "rollout_logprobs is missing"),
    "half a switch": (policy_job("policy_loss", {"use_tis": 0.5}), "use_tis: 0.5 is not one of 0.0, 1.0"),
    "kl without reference": (policy_job("drgrpo", {"beta": 0.1}), "ref_logprobs is missing"),
    "unknown choice": (policy_job("drgrpo", {"kl_type": "k4"}), "kl_type: 'k4' is not one of k1, k2, k3"),
    "number for a text": (policy_job("drgrpo", {"kl_type": 3.0}), "kl_type: 3.0 is a number"),
    "unpublished": (policy_job("stable_reinforce", {}), "its formula is not published; use importance_sampling"),
    "code": (policy_job("custom", {"loss_id": "l"}), "runs no code of its clients"),
}


@pytest.fixture(scope="module")
def driver() -> Driver:
    driver = Driver(open_engine())
    driver.create("m")
    return driver


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_parameter_or_input_is_refused_by_name(case: str, driver: Driver) -> None:
    payload, text = BAD[case]
    (outcome,) = driver.run(("m", payload))
    assert isinstance(outcome, Failed)
    assert outcome.category == "user"
    assert text in outcome.message


@pytest.mark.parametrize("name", [name for name in NAMES if LOSSES[name].card.max_candidates == 1])
def test_a_loss_with_one_target_per_token_refuses_several(name: str, driver: Driver) -> None:
    wide = Column.of([np.array([[1, 2], [3, 4]])], dtype="int64", trailing=(2,))
    job = policy_job(name, {})
    inputs = {key: value for key, value in job.inputs.items() if key in {s.name for s in LOSSES[name].card.inputs}}
    (outcome,) = driver.run(("m", ForwardBackward(tokens=job.tokens, inputs={**inputs, TARGETS: wide}, loss_fn=name)))
    assert isinstance(outcome, Failed)
    assert "target_tokens: shape [T, 2] is not [T]" in outcome.message


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
