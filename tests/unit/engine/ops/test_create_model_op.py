"""What an adapter's spec may say of its scale."""

import math

import pytest
import torch
from tests.support.engine_builders import LORA_ALPHA, Driver, cross_entropy, open_engine, random_data
from tests.support.snapshots import restore, snapshot

from gradstream.shared.ids import SessionId
from gradstream.shared.wire import CreateModel, Failed, LoraSpec, ResetModel


def create(*, alpha: float | None) -> CreateModel:
    return CreateModel(session_id=SessionId("s"), base_model="tiny", lora=LoraSpec(rank=4, seed=1, alpha=alpha))


def test_an_adapters_own_alpha_goes_before_the_servers(tmp_path):
    driver = Driver(open_engine())
    driver.done("own", create(alpha=6.0))
    driver.done("servers", create(alpha=None))
    scales = {model.model_id: model.scale for model in driver.engine.capture(driver.engine.state.models)}
    assert scales == {"own": 1.5, "servers": LORA_ALPHA / 4}
    other = open_engine(lora_alpha=99.0)
    restore(other, snapshot(driver.engine, tmp_path))
    assert {model.model_id: model.scale for model in other.capture(other.state.models)} == scales
    driver.done("own", ResetModel(weights=True))
    assert driver.engine.state.models["own"].scale == 1.5


def test_a_greater_alpha_is_a_greater_change():
    grads = {}
    for alpha in (2.0, 8.0):
        driver = Driver(open_engine())
        driver.done("m", create(alpha=alpha))
        driver.done("m", cross_entropy(random_data([9, 4])))
        grads[alpha] = driver.grad("m")
    torch.testing.assert_close(grads[8.0], 4 * grads[2.0])


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_is_no_scale_is_refused(alpha):
    driver = Driver(open_engine())
    (outcome,) = driver.run(("m", create(alpha=alpha)))
    assert isinstance(outcome, Failed)
    assert "lora.alpha" in outcome.message
    assert not driver.engine.state.models
