"""Work that finds no room is done once idle adapters have left the device. The device is a count of units that objects hold while they live."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.engine_builders import Driver, create, cross_entropy, open_engine, random_data
from tests.support.relora import merging_driver
from tests.support.snapshots import assert_same_state

from gradstream.engine import passes
from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint import shared
from gradstream.engine.ops import create_model, load_weights, optim_step
from gradstream.engine.residency.parked import ParkedModel
from gradstream.engine.sampler.forward import Forward
from gradstream.shared.errors import OutOfMemory
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId
from gradstream.shared.wire import (
    AdamParams,
    Failed,
    LoadWeights,
    OptimStep,
    Payload,
    Sample,
    SamplingParams,
    SaveForSampler,
    SaveWeights,
)

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


def loaded(path: str, *, is_new: bool = False) -> LoadWeights:
    return LoadWeights(path=path, with_optimizer=False, create=is_new, session_id=SessionId("s"))


SAMPLE = Sample(
    path="tinker://a/sampler_weights/frozen", prompt=bytes(4), params=SamplingParams(max_tokens=1, temperature=0.0)
)


@pytest.mark.parametrize(
    ("place", "name", "model", "payload"),
    [
        (create_model, "new_adapter", "new", create()),
        (load_weights, "new_adapter", "new", loaded("tinker://a/weights/saved", is_new=True)),
        (shared, "factors_of", "a", loaded("tinker://a/weights/saved")),
        (shared, "to_tensor", "sampler", SAMPLE),
        (Forward, "hidden", "sampler", SAMPLE),
        (Adapter, "frozen_copy", "a", SaveForSampler(name="new", session_id=SessionId("s"))),
        (optim_step, "coming_merge", "a", OptimStep(adam=AdamParams())),
        (optim_step, "update", "a", OptimStep(adam=AdamParams())),
    ],
    ids=[
        "create",
        "load into a new one",
        "load",
        "a sampler's weights",
        "sample",
        "save for sampler",
        "merge",
        "update",
    ],
)
def test_an_idle_model_leaves_for_work_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, model: str, payload: Payload
) -> None:
    driver = merging_driver(output_dir=tmp_path, interval=1)
    for one in "ab":
        driver.create(one, rank=4)
    driver.done("a", OptimStep(adam=AdamParams()))
    driver.done("a", SaveWeights(name="saved"))
    driver.done("a", SaveForSampler(name="frozen", session_id=SessionId("s")))
    driver.engine.state.samplers.drop("tinker://a/sampler_weights/frozen")
    work = getattr(place, name)
    tries: list[bool] = []

    def crowded(*arguments: Any, **named: Any) -> Any:
        tries.append(is_idle(driver, "b"))
        if not tries[-1]:
            # As memory_as_failure makes it of torch's where the work itself is what asks for memory.
            raise OutOfMemory("no room") if name == "update" else torch.OutOfMemoryError("CUDA out of memory. GPU 0")
        return work(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, crowded)
        driver.done(model, payload)
    assert tries == [False, True]


def test_frozen_adapters_that_no_sample_uses_leave_for_one_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(open_engine(output_dir=tmp_path))
    driver.create("a")
    for name in ("frozen", "other"):
        driver.done("a", SaveForSampler(name=name, session_id=SessionId("s")))
    driver.engine.state.models.shed()
    expected = [driver.done("sampler", sampled(name)) for name in ("other", "frozen")]
    hidden = Forward.hidden
    resident: list[list[bool]] = []

    def crowded(*arguments: Any, **named: Any) -> Any:
        store = driver.engine.state.samplers
        resident.append([store.get(sampled(name).path, LOCAL_TENANT) is not None for name in ("other", "frozen")])
        if all(resident[-1]):
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0")
        return hidden(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Forward, "hidden", crowded)
        assert driver.done("sampler", sampled("frozen")) == expected[1]
    assert resident == [[True, True], [False, True]]
    assert driver.done("sampler", sampled("other")) == expected[0]


def sampled(name: str) -> Sample:
    params = SamplingParams(max_tokens=1, temperature=0.0)
    return Sample(path=f"tinker://a/sampler_weights/{name}", prompt=bytes(4), params=params)


def is_idle(driver: Driver, name: str) -> bool:
    return isinstance(driver.engine.state.models.peek(ModelId(name)), ParkedModel)


def test_a_merged_model_leaves_a_device_that_has_no_room_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = merging_driver(output_dir=tmp_path, interval=1)
    driver.create("a", rank=4)
    driver.done("a", OptimStep(adam=AdamParams()))
    (before,) = driver.engine.capture([ModelId("a")])
    allocate = torch.empty

    def full(*arguments: Any, device: object = None, **named: Any) -> torch.Tensor:
        if device is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0")
        return allocate(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        driver.engine.state.models.shed()
    assert is_idle(driver, "a")
    (after,) = driver.engine.capture([ModelId("a")])
    assert_same_state(after, before)
