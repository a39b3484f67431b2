"""Outcomes as xorl clients read them."""

import json
import math

import numpy as np
import pytest

from gradstream.api.xorl.results import outcome_json
from gradstream.shared.columns import Column
from gradstream.shared.wire import (
    CreateModelDone,
    ForwardBackwardDone,
    LoadWeightsDone,
    OptimStepDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    UnloadModelDone,
)


def column(*arrays: list[float]) -> Column:
    return Column.of([np.array(array, dtype=np.float32) for array in arrays], dtype="float32")


def trained(**metrics: float) -> ForwardBackwardDone:
    outputs = {
        "loss": column([1.5], [2.5]),
        "logprobs": column([-1.0, -2.0], [-2.5]),
        "elementwise_loss": column([1.0, 2.0], [2.5]),
    }
    return ForwardBackwardDone(outputs=outputs, metrics=metrics)


def test_every_datum_has_its_loss_and_its_tokens_numbers_in_order():
    result = json.loads(outcome_json(trained(**{"loss:sum": 5.5})))
    first, second = result["loss_fn_outputs"]
    assert first["loss"] == {"data": [1.5], "dtype": "float32", "shape": [1]}
    assert first["logprobs"] == {"data": [-1.0, -2.0], "dtype": "float32", "shape": [2]}
    assert second["elementwise_loss"] == {"data": [2.5], "dtype": "float32", "shape": [1]}
    assert result["metrics"] == {"loss:sum": 5.5}
    assert result["info"] == {}


def test_a_step_names_its_rate_in_full():
    result = json.loads(outcome_json(OptimStepDone(metrics={"grad_norm": 2.0, "lr": 0.1, "step": 3.0})))
    assert result["metrics"] == {"grad_norm": 2.0, "lr": 0.1, "learning_rate": 0.1, "step": 3.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible(value):
    for done in (trained(**{"ratio:max": value}), OptimStepDone(metrics={"grad_norm": value})):
        (found,) = json.loads(outcome_json(done))["metrics"].values()
        assert found == value or (math.isnan(found) and math.isnan(value))
    done = ForwardBackwardDone(outputs={"logprobs": column([value])}, metrics={})
    found = json.loads(outcome_json(done))["loss_fn_outputs"][0]["logprobs"]["data"][0]
    assert found == value or (math.isnan(found) and math.isnan(value))


@pytest.mark.parametrize(
    ("done", "shown"),
    [
        (CreateModelDone(model_id="mine"), {"type": "create_model", "model_id": "mine"}),
        (UnloadModelDone(model_id="acme:mine"), {"type": "unload_model", "model_id": "mine"}),
        (SaveWeightsDone(path="tinker://mine/weights/a"), {"path": "xorl://mine/weights/a"}),
        (LoadWeightsDone(path="tinker://acme:mine/weights/a", model_id="x"), {"path": "xorl://mine/weights/a"}),
        (SaveForSamplerDone(path="tinker://mine/sampler_weights/a"), {"path": "xorl://mine/sampler_weights/a"}),
    ],
)
def test_names_are_those_that_the_client_gave(done, shown):
    assert json.loads(outcome_json(done)) == shown
