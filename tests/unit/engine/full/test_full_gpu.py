"""Full weights on a GPU: what leaves it when the model sleeps, and what comes back."""

import pytest
import torch
from tests.support.engine_builders import DENSE, cross_entropy, random_data
from tests.support.full import MODEL, create_full, full_driver, full_model
from tests.support.snapshots import assert_same_state

from gradstream.shared.wire import OffloadModel, OffloadModelDone, UnloadModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_model_that_sleeps_leaves_the_device_and_wakes_with_its_bits() -> None:
    driver = full_driver(DENSE, device="cuda", dtype="bfloat16")
    model = full_model(driver.engine)
    driver.done(MODEL, cross_entropy(random_data([12, 7])))
    driver.step(MODEL, learning_rate=1e-3)
    driver.done(MODEL, cross_entropy(random_data([9], seed=3)))
    (before,) = driver.engine.capture([MODEL])
    used_bytes = torch.cuda.memory_allocated()

    asleep = driver.done(MODEL, OffloadModel(asleep=True))

    assert isinstance(asleep, OffloadModelDone)
    # Master weights, gradient and two moments in float32, and the weights of passes in bfloat16.
    assert asleep.bytes_moved == 18 * model.layout.num_params
    assert used_bytes - torch.cuda.memory_allocated() >= asleep.bytes_moved
    assert {parameter.device.type for parameter in driver.engine.state.base.causal_lm.parameters()} == {"cpu"}
    assert_same_state(before, *driver.engine.capture([MODEL]))

    driver.done(MODEL, OffloadModel(asleep=False))

    assert_same_state(before, *driver.engine.capture([MODEL]))
    assert {parameter.device.type for parameter in driver.engine.state.base.causal_lm.parameters()} == {"cuda"}
    driver.done(MODEL, cross_entropy(random_data([12, 7])))
    driver.step(MODEL, learning_rate=1e-3)


def test_a_model_dropped_in_its_sleep_leaves_the_device_free_until_the_next_is_made() -> None:
    driver = full_driver(DENSE, device="cuda", dtype="bfloat16")
    (fresh,) = driver.engine.capture([MODEL])
    driver.done(MODEL, cross_entropy(random_data([12, 7])))
    driver.step(MODEL, learning_rate=1e-3)
    driver.done(MODEL, OffloadModel(asleep=True))
    driver.done(MODEL, UnloadModel())
    assert driver.engine.state.flat.weights.device.type == "cpu"
    driver.done(MODEL, create_full())
    assert_same_state(fresh, *driver.engine.capture([MODEL]))
    driver.done(MODEL, cross_entropy(random_data([12, 7])))
