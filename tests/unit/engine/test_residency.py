"""Models that leave the device, and host memory, come back as the same bits; what cannot come back is an error, never other weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from tests.support.engine_builders import (
    Driver,
    cross_entropy,
    open_engine,
    random_data,
    randomize,
)
from tests.support.snapshots import assert_same_state, restore, snapshot

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.engine import Engine
from gradstream.engine.residency import files, table
from gradstream.engine.residency.files import ParkedFileDamaged, ParkingPlace, remove_left
from gradstream.engine.residency.parked import ParkedModel
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared.ids import ModelId, SessionId
from gradstream.shared.wire import (
    AdamParams,
    Failed,
    OptimStep,
    Outcome,
    Payload,
    RestoreSnapshotDone,
    Sample,
    SampleDone,
    SamplingParams,
    SaveForSampler,
    SaveForSamplerDone,
    UnloadModel,
    UnloadModelDone,
)

NAMES = "abcdef"
# In memory as far as host_bytes goes, in files from there on.
IN_HOST, IN_FILES = 1 << 30, 0


def bounded(tmp_path: Path, *, max_active: int = 2, host_bytes: int = IN_HOST) -> Driver:
    engine = open_engine(output_dir=tmp_path, max_active_adapters=max_active, adapter_host_memory_bytes=host_bytes)
    return Driver(engine, row_budget_tokens=64)


def with_models(driver: Driver, names: str = NAMES) -> Driver:
    for number, name in enumerate(names):
        driver.create(name, rank=4 + 4 * (number % 2), seed=number)
        randomize(driver, name, seed=number)
    return driver


def random_work(*, num_batches: int, seed: int = 0) -> list[list[tuple[str, Payload]]]:
    """Batches of passes of one or two models, and of updates, in random order."""
    rng = np.random.default_rng(seed)
    batches: list[list[tuple[str, Payload]]] = []
    for number in range(num_batches):
        chosen = [NAMES[index] for index in rng.permutation(len(NAMES))[: rng.integers(1, 3)]]
        if rng.random() < 0.4:
            batches.append([(name, OptimStep(adam=AdamParams(learning_rate=1e-2))) for name in chosen])
        else:
            batches.append([(name, cross_entropy(random_data([5, 9], seed=number))) for name in chosen])
    return batches


def places(engine: Engine) -> dict[str, str]:
    """Where each model is, when nothing is being written: device, host or file."""
    table = engine.state.models
    table.settle()
    found = {}
    for name in table:
        model = table.peek(name)
        found[str(name)] = "device" if not isinstance(model, ParkedModel) else "file" if model.is_in_file else "host"
    return found


def is_in_host(engine: Engine, name: str) -> bool:
    model = engine.state.models.peek(ModelId(name))
    return isinstance(model, ParkedModel) and not model.is_in_file


def states(engine: Engine) -> dict[str, ModelState]:
    return {str(model.model_id): model for model in engine.capture(sorted(engine.state.models))}


def assert_same_models(left: Engine, right: Engine) -> None:
    one, other = states(left), states(right)
    assert one.keys() == other.keys()
    for name, state in one.items():
        assert_same_state(state, other[name])


def the_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / files.PARKED).glob(f"*/*{files.SUFFIX}"))


@pytest.mark.parametrize("host_bytes", [IN_HOST, 900_000, IN_FILES], ids=["host", "both", "files"])
def test_six_models_with_room_for_two_are_the_bits_of_six_models_with_room_for_all(
    tmp_path: Path, host_bytes: int
) -> None:
    small = with_models(bounded(tmp_path, host_bytes=host_bytes))
    whole = with_models(bounded(tmp_path, max_active=64))
    seen = set()
    for batch in random_work(num_batches=40):
        assert small.run(*batch) == whole.run(*batch)
        at = places(small.engine)
        assert list(at.values()).count("device") == 2
        seen.update(at.values())
    assert set(places(whole.engine).values()) == {"device"}
    assert seen == {IN_HOST: {"device", "host"}, IN_FILES: {"device", "file"}}.get(
        host_bytes, {"device", "host", "file"}
    )
    assert any(state.has_grad for state in states(small.engine).values())
    assert_same_models(small.engine, whole.engine)


def test_those_used_least_recently_leave_and_never_one_of_the_running_batch(tmp_path: Path) -> None:
    driver = with_models(bounded(tmp_path, max_active=2), "abc")
    assert places(driver.engine) == {"a": "host", "b": "device", "c": "device"}
    driver.run(("b", cross_entropy(random_data([5]))), ("a", cross_entropy(random_data([5]))))
    assert places(driver.engine) == {"a": "device", "b": "device", "c": "host"}


def test_only_a_look_up_by_id_brings_a_model_to_the_device(tmp_path: Path) -> None:
    driver = with_models(bounded(tmp_path), "abc")
    table = driver.engine.state.models
    before = places(driver.engine)
    assert (list(table), len(table), ModelId("a") in table) == (["a", "b", "c"], 3, True)
    assert not any(hasattr(table, name) for name in ("get", "keys", "values", "items", "pop"))
    assert places(driver.engine) == before
    assert before["a"] == "host"
    assert not isinstance(table[ModelId("a")], ParkedModel)
    assert places(driver.engine)["a"] == "device"


def test_a_model_that_is_used_around_a_batch_is_the_one_that_the_batch_changes(tmp_path: Path) -> None:
    driver = with_models(bounded(tmp_path, max_active=1), "abc")
    table = driver.engine.state.models
    with table.batch([ModelId("a")]):
        model = table[ModelId("a")]
        driver.run(*[(name, cross_entropy(random_data([5]))) for name in "bca"])
        assert table.peek(ModelId("a")) is model
        assert model.has_grad
    assert list(places(driver.engine).values()).count("device") == 1


def test_a_recorded_batch_of_more_models_than_the_bound_runs_as_it_ran(tmp_path: Path) -> None:
    small, whole = with_models(bounded(tmp_path)), with_models(bounded(tmp_path, max_active=64))
    batch = [(name, cross_entropy(random_data([5, 3]))) for name in NAMES]
    assert small.run(*batch) == whole.run(*batch)
    assert list(places(small.engine).values()).count("device") == 2
    assert_same_models(small.engine, whole.engine)


@pytest.mark.parametrize("host_bytes", [IN_HOST, IN_FILES], ids=["host", "files"])
def test_after_a_recovery_all_models_are_parked_with_the_bits_of_the_cut(tmp_path: Path, host_bytes: int) -> None:
    first = with_models(bounded(tmp_path, host_bytes=host_bytes))
    work = random_work(num_batches=20)
    for batch in work[:10]:
        first.run(*batch)
    before = places(first.engine)
    payload = snapshot(first.engine, tmp_path / "cuts")
    assert places(first.engine) == before
    second = bounded(tmp_path, host_bytes=host_bytes)
    outcome = restore(second.engine, payload)
    assert not isinstance(outcome, Failed)
    assert "device" not in places(second.engine).values()
    assert_same_models(first.engine, second.engine)
    for batch in work[10:]:
        assert [type(one) for one in first.run(*batch)] == [type(one) for one in second.run(*batch)]
    assert_same_models(first.engine, second.engine)


def test_a_cut_of_more_models_than_the_device_has_room_for_is_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = with_models(bounded(tmp_path, max_active=64))
    payload = snapshot(first.engine, tmp_path / "cuts")
    second = bounded(tmp_path, max_active=64)

    def lack(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0")

    with monkeypatch.context() as patch:
        patch.setattr(Adapter, "__init__", lack)
        assert isinstance(restore(second.engine, payload), RestoreSnapshotDone)
    assert_same_models(first.engine, second.engine)
    job = ("a", cross_entropy(random_data([5])))
    assert first.run(job) == second.run(job)


def test_models_that_rest_are_not_copied_for_a_cut(tmp_path: Path) -> None:
    driver = with_models(bounded(tmp_path), "abc")
    first, second = (driver.engine.capture([ModelId("a")])[0] for _ in range(2))
    assert first.tensors["weights"] is second.tensors["weights"]


def test_a_copy_of_a_model_in_a_file_outlives_the_file(tmp_path: Path) -> None:
    driver = with_models(bounded(tmp_path, host_bytes=IN_FILES), "abc")
    driver.engine.state.models.settle()
    (copy,) = driver.engine.capture([ModelId("a")])
    expected = {name: tensor.clone() for name, tensor in copy.tensors.items()}
    driver.step("a", learning_rate=1.0)
    assert places(driver.engine)["a"] == "device"
    assert len(the_files(tmp_path)) == 1
    assert all(torch.equal(copy.tensors[name], tensor) for name, tensor in expected.items())


class Held:
    """A disk that writes nothing until it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_write = Event()
        write = files.write_parked

        def held(path: Path, tensors: Mapping[str, torch.Tensor]) -> files.ParkedFile:
            assert self.may_write.wait(timeout=60)
            return write(path, tensors)

        monkeypatch.setattr(files, "write_parked", held)


def test_batches_do_not_wait_for_files_and_a_model_comes_back_before_its_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, whole = bounded(tmp_path / "small", host_bytes=IN_FILES), bounded(tmp_path / "whole", max_active=64)
    disk = Held(monkeypatch)
    with_models(small)
    with_models(whole)
    for batch in random_work(num_batches=20):
        assert small.run(*batch) == whole.run(*batch)
    assert sum(is_in_host(small.engine, name) for name in NAMES) == len(NAMES) - 2
    assert_same_models(small.engine, whole.engine)
    disk.may_write.set()
    assert list(places(small.engine).values()).count("file") == len(NAMES) - 2
    # Those that came back meanwhile have left no files.
    assert len(the_files(tmp_path / "small")) == len(NAMES) - 2
    assert_same_models(small.engine, whole.engine)


def test_a_model_that_is_unloaded_while_its_file_is_written_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Held(monkeypatch)
    driver = with_models(bounded(tmp_path, host_bytes=IN_FILES), "abc")
    driver.done("a", UnloadModel())
    driver.step("b")
    driver.create("d")
    disk.may_write.set()
    assert places(driver.engine) == {"b": "device", "c": "file", "d": "device"}
    assert len(the_files(tmp_path)) == 1


def test_a_state_of_any_tensors_is_read_as_it_was_written(tmp_path: Path) -> None:
    place = ParkingPlace(tmp_path)
    tensors = {
        "few": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 7).bfloat16(),
        "none": torch.empty(0),
        "turned": torch.randn(4, 3).t(),
        "one": torch.tensor(1.5, dtype=torch.float64),
        "many": torch.randn(700_001),
    }
    found = place.start(tensors).result().read()
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("damage", [flip, cut_short, Path.unlink], ids=["flipped", "short", "gone"])
def test_a_damaged_file_ends_the_process_and_gives_no_weights(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    driver = with_models(bounded(tmp_path, host_bytes=IN_FILES), "abc")
    driver.engine.state.models.settle()
    (path,) = the_files(tmp_path)
    damage(path)
    with pytest.raises(ParkedFileDamaged, match=path.name):
        driver.run(("a", cross_entropy(random_data([5]))))
    with pytest.raises(ParkedFileDamaged):
        driver.engine.capture([ModelId("a")])
    assert not isinstance(driver.run(("b", cross_entropy(random_data([5]))))[0], Failed)


def test_models_that_leave_together_enter_host_memory_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = with_models(bounded(tmp_path, max_active=64, host_bytes=IN_FILES))
    held: list[int] = []
    write = ParkingPlace.write

    def counted(place: ParkingPlace, tensors: dict[str, torch.Tensor]) -> files.ParkedFile:
        held.append(sum(is_in_host(driver.engine, name) for name in NAMES))
        return write(place, tensors)

    monkeypatch.setattr(ParkingPlace, "write", counted)
    monkeypatch.setattr(table, "MAX_WRITING_BYTES", 0)
    driver.engine.state.models.shed()
    driver.engine.state.models.settle()
    assert len(held) == len(NAMES)
    # One that is written, and one that waits for it.
    assert max(held) <= 2


def test_a_disk_that_is_full_leaves_models_in_host_memory_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    driver = bounded(tmp_path, host_bytes=IN_FILES)
    with monkeypatch.context() as patch, capture_logs() as logs:
        patch.setattr(files, "write_parked", full)
        with_models(driver, "abcd")
        driver.engine.state.models.settle()
    assert sorted(places(driver.engine).values()) == ["device", "device", "host", "host"]
    (told,) = [entry for entry in logs if entry["event"] == "parked_models_stay_in_memory"]
    assert "the disk is full" in told["reason"]
    # One at a time, as long as it is not known that there is room again.
    for _ in range(2):
        driver.step("a")
        driver.engine.state.models.settle()
    assert sorted(places(driver.engine).values()) == ["device", "device", "file", "file"]


@pytest.mark.parametrize("host_bytes", [IN_HOST, IN_FILES], ids=["host", "files"])
def test_a_model_that_rests_is_unloaded_where_it_is(tmp_path: Path, host_bytes: int) -> None:
    driver = with_models(bounded(tmp_path, host_bytes=host_bytes), "abc")
    assert isinstance(driver.done("a", UnloadModel()), UnloadModelDone)
    assert places(driver.engine) == {"b": "device", "c": "device"}
    assert not the_files(tmp_path)
    driver.create("a")
    assert places(driver.engine) == {"a": "device", "b": "file" if host_bytes == IN_FILES else "host", "c": "device"}


def test_a_model_that_rests_is_saved_and_sampled_from(tmp_path: Path) -> None:
    def sampled(driver: Driver) -> Outcome:
        saved = driver.done("a", SaveForSampler(name="s", session_id=SessionId("s")))
        assert isinstance(saved, SaveForSamplerDone)
        assert saved.path is not None
        prompt = np.arange(3, dtype="<i4").tobytes()
        return driver.done(
            "sampler", Sample(prompt=prompt, params=SamplingParams(max_tokens=4, temperature=0.0), path=saved.path)
        )

    small = with_models(bounded(tmp_path / "small", host_bytes=IN_FILES))
    whole = with_models(bounded(tmp_path / "whole", max_active=64))
    answer = sampled(small)
    assert isinstance(answer, SampleDone)
    assert answer == sampled(whole)


def test_files_go_with_their_process_or_with_the_next_one(tmp_path: Path) -> None:
    tensors = {"weights": torch.zeros(4)}
    alive, dead = ParkingPlace(tmp_path), tmp_path / "dead"
    held = alive.write(tensors)
    dead.mkdir()
    (dead / "lock").touch()
    (dead / f"00000001{files.SUFFIX}").touch()
    remove_left(tmp_path)
    assert not dead.exists()
    assert torch.equal(held.read()["weights"], tensors["weights"])
    path = held.path
    del held
    assert not path.exists()
    del alive
    assert not list(tmp_path.iterdir())
