"""Work that finds no room is done once idle adapters have left the device. The device is a count of units that objects hold while they live."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data

from gradstream.engine import passes
from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.residency.parked import ParkedModel
from gradstream.shared.wire import Failed

ROOM = 100
ADAPTER = 10


class Device:
    """What is left of it."""

    def __init__(self) -> None:
        self.num_free = ROOM

    def take(self, units: int) -> "Unit":
        if units > self.num_free:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        self.num_free -= units
        unit = Unit()
        weakref.finalize(unit, self._give_back, units)
        return unit

    def _give_back(self, units: int) -> None:
        self.num_free += units


class Unit:
    """Part of the device, until it is gone."""


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """One on which every adapter takes 10 units."""
    device, make = Device(), Adapter.__init__

    def init(self: Any, **fields: Any) -> None:
        self.unit = device.take(ADAPTER)
        make(self, **fields)

    monkeypatch.setattr(Adapter, "__init__", init)
    return device


def with_models(tmp_path: Path, number: int) -> Driver:
    driver = Driver(open_engine(output_dir=tmp_path, max_active_adapters=64))
    for name in range(number):
        driver.create(f"m{name}")
    return driver


def taking(monkeypatch: pytest.MonkeyPatch, device: Device, steps: int) -> None:
    """From now on a pass takes so many units, five at a time."""
    run: Callable[..., Any] = passes._run_rows

    def run_rows(*arguments: Any) -> Any:
        held: list[Unit] = []
        held.extend(device.take(5) for _ in range(0, steps, 5))
        return run(*arguments)

    monkeypatch.setattr(passes, "_run_rows", run_rows)


def on_device(driver: Driver) -> int:
    table = driver.engine.state.models
    return sum(not isinstance(table.peek(name), ParkedModel) for name in table)


def test_a_pass_is_tried_again_without_what_the_failed_one_held(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = with_models(tmp_path, 6)
    taking(monkeypatch, device, ROOM - 2 * ADAPTER)
    driver.done("m0", cross_entropy(random_data([5])))
    assert on_device(driver) == 1


def test_a_pass_that_never_has_room_fails_and_leaves_nothing_behind(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = with_models(tmp_path, 6)
    with monkeypatch.context() as patch:
        taking(patch, device, ROOM)
        (outcome,) = driver.run(("m0", cross_entropy(random_data([5]))))
    assert isinstance(outcome, Failed)
    assert outcome.code == "out_of_memory"
    assert device.num_free == ROOM - ADAPTER
    driver.done("m0", cross_entropy(random_data([5])))


def test_a_model_that_comes_back_takes_the_room_of_idle_ones(tmp_path: Path, device: Device) -> None:
    driver = with_models(tmp_path, 9)
    driver.engine.state.models.shed()
    for number in range(1, 9):
        driver.done(f"m{number}", cross_entropy(random_data([5])))
    held = device.take(2 * ADAPTER)
    driver.done("m0", cross_entropy(random_data([5])))
    assert on_device(driver) == 1
    del held
