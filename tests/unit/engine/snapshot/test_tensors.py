"""A snapshot's tensors that are not what the model's layout and optimizer need are told when they are read."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.snapshot.state import FROZEN, GRAD, WEIGHTS, check_tensors
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import ModelId


def gone(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def too_short(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1]


def in_double(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize("damage", [gone, too_short, in_double])
@pytest.mark.parametrize("name", [WEIGHTS, GRAD, "exp_avg", "exp_avg_sq", FROZEN])
def test_a_tensor_that_does_not_fit_is_named(name: str, damage: Callable[[dict[str, Tensor], str], None]) -> None:
    driver = Driver(open_engine())
    driver.create("a")
    driver.done("a", cross_entropy(random_data([5])))
    model = driver.engine.state.models[ModelId("a")]
    assert isinstance(model, Adapter)
    (state,) = driver.engine.capture([ModelId("a")])
    tensors = state.tensors | {FROZEN: torch.zeros(2 * model.layout.num_params)}
    check_tensors(replace(state, tensors=tensors), model.layout)
    damage(tensors, name)
    if name == FROZEN and damage is gone:
        check_tensors(replace(state, tensors=tensors), model.layout)
        return
    with pytest.raises(StorageFailure, match=f"model a does not hold '{name}'"):
        check_tensors(replace(state, tensors=tensors), model.layout)
