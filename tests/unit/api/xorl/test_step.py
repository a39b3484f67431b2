"""Which hyper-parameters an optimizer step takes, and from where."""

import pytest

from gradstream.api.xorl.specs import StepDefaults
from gradstream.api.xorl.training import AdamBody, OptimStepBody, adam_params
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import AdamParams

MADE_WITH = StepDefaults(learning_rate=3e-4, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.1)


def step(defaults: StepDefaults = MADE_WITH, **fields: object) -> AdamParams:
    return adam_params(OptimStepBody.model_validate(fields), defaults)


def test_the_requests_own_rate_comes_first():
    assert step(learning_rate=1e-2, adam_params={"learning_rate": 2e-2}).learning_rate == 1e-2
    assert step(lr=1e-2, adam_params={"learning_rate": 2e-2}).learning_rate == 1e-2


def test_then_that_of_adam_params():
    assert step(adam_params={"learning_rate": 2e-2}).learning_rate == 2e-2
    assert step(adam_params={"lr": 2e-2}).learning_rate == 2e-2


def test_then_that_of_the_models_optimizer_config():
    assert step().learning_rate == 3e-4
    assert step(adam_params={"beta1": 0.5}).learning_rate == 3e-4


def test_then_the_servers():
    assert step(StepDefaults()) == AdamParams(learning_rate=1e-4)


def test_a_rate_of_0_is_a_rate():
    assert step(learning_rate=0.0, adam_params={"learning_rate": 1.0}).learning_rate == 0.0


def test_what_the_request_leaves_out_is_as_the_model_was_made():
    found = step(adam_params={"beta1": 0.5, "weight_decay": 0.0})
    assert found == AdamParams(learning_rate=3e-4, beta1=0.5, beta2=0.9, eps=1e-6, weight_decay=0.0)


@pytest.mark.parametrize(
    ("fields", "clip"),
    [
        ({}, 0.0),
        ({"gradient_clip": 1.0}, 1.0),
        ({"gradient_clip": 1.0, "adam_params": {"grad_clip_norm": 5.0}}, 1.0),
        ({"adam_params": {"grad_clip_norm": 5.0}}, 5.0),
        ({"gradient_clip": 0.0, "adam_params": {"grad_clip_norm": 5.0}}, 0.0),
        ({"gradient_clip": -1.0}, 0.0),
    ],
)
def test_gradient_clip_comes_before_grad_clip_norm_and_none_means_no_clipping(fields, clip):
    assert step(**fields).grad_clip_norm == clip


def test_two_names_with_different_rates_are_refused():
    with pytest.raises(InvalidRequest, match=r"learning_rate, lr: 0.1 and 0.2; they mean the same"):
        step(learning_rate=0.1, lr=0.2)
    with pytest.raises(InvalidRequest, match=r"adam_params.learning_rate"):
        adam_params(OptimStepBody(adam_params=AdamBody(learning_rate=0.1, lr=0.2)), StepDefaults())


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"learning_rate": 1e39}, "learning_rate"),
        ({"adam_params": {"weight_decay": 1e308}}, "weight_decay"),
        ({"adam_params": {"eps": 1e39}}, "eps"),
        ({"gradient_clip": 1e39}, "grad_clip_norm"),
    ],
)
def test_a_number_beyond_float32_is_refused_by_name(fields, field):
    with pytest.raises(InvalidRequest, match=rf"adam_params.{field}: 1e\+[0-9]+ is beyond float32"):
        step(**fields)
