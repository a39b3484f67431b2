"""Saves that have no room: refused with numbers before anything is written, or by the disk itself."""

from pathlib import Path

import pytest
import torch
from tests.support.adapters import CPU, noisy_adapter, save_adapter

from gradstream.engine.checkpoint.budget import DiskBudget, save_size_bytes, size_bytes
from gradstream.engine.checkpoint.location import CheckpointKind, Location, checkpoint, ephemeral
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.models.build import load_base
from gradstream.engine.optim.state import state_parts
from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import StorageFailure, StorageLimit
from gradstream.shared.ids import FutureId, ModelId, SamplerId
from gradstream.shared.wire import LoraSpec

DENSE = Path("tests/models/tiny-qwen3-shakespeare")
MOE = Path("tests/models/tiny-qwen3-moe-shakespeare")
LOCATIONS = {
    "training": checkpoint(ModelId("m"), CheckpointKind.WEIGHTS, "a"),
    "sampler": checkpoint(ModelId("m"), CheckpointKind.SAMPLER_WEIGHTS, "a"),
    "external": checkpoint(ModelId("m"), CheckpointKind.EXTERNAL_WEIGHTS, "a"),
    "ephemeral": ephemeral(SamplerId("s:sample:1")),
}


@pytest.fixture(scope="module")
def dense():
    return load_base(DENSE, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def moe():
    return load_base(MOE, device=CPU, dtype=torch.float32)


def save(adapter, root: Path, location: Location, *, budget=None, job="m:1", **options):
    order = SaveOrder(location=location, job=FutureId(job), base_model="tiny", **options)
    return save_adapter(adapter, order, root, budget=budget, clock=ManualClock())


def estimate_of(adapter, *, has_optimizer, metadata_bytes=0):
    state = state_parts(adapter.optimizer, adapter.layout) if has_optimizer else ()
    return save_size_bytes(adapter.layout, state=state, metadata_bytes=metadata_bytes)


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS.keys())
@pytest.mark.parametrize("model", ["dense", "moe"])
@pytest.mark.parametrize("rank", [1, 16])
def test_the_estimate_is_never_below_what_a_save_takes_and_close_above(request, tmp_path, model, location, rank):
    adapter = noisy_adapter(request.getfixturevalue(model), spec=LoraSpec(rank=rank, seed=1))
    manifest = save(adapter, tmp_path, location, user_metadata={"k\n": "\x01" * 3000})
    estimate = estimate_of(adapter, has_optimizer=manifest.has_optimizer, metadata_bytes=6 * 3002)
    taken = size_bytes(tmp_path)
    assert taken <= estimate <= taken + 32 * 1024 + 6 * 3002 + 6 * len(adapter.layout.sites) * 320


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS.keys())
def test_a_save_over_the_limit_says_the_numbers_and_writes_nothing(dense, tmp_path, location):
    adapter = noisy_adapter(dense)
    coming = estimate_of(adapter, has_optimizer=location == LOCATIONS["training"])
    (tmp_path / "log").write_bytes(bytes(1000))
    budget = DiskBudget(tmp_path, limit_bytes=coming + 999)
    with pytest.raises(StorageLimit, match=rf"{coming} bytes, 1000 of storage_limit {coming + 999} are used"):
        save(adapter, tmp_path, location, budget=budget)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    save(adapter, tmp_path, location, budget=DiskBudget(tmp_path, limit_bytes=coming + 1000))


def test_a_refusal_leaves_the_checkpoint_that_was_to_be_replaced(dense, tmp_path):
    adapter, place = noisy_adapter(dense), LOCATIONS["training"]
    first = save(adapter, tmp_path, place)
    budget = DiskBudget(tmp_path, limit_bytes=size_bytes(tmp_path) - 1)
    with pytest.raises(StorageLimit, match="in place of"):
        save(adapter, tmp_path, place, budget=budget, job="m:2", overwrite=True)
    assert save(adapter, tmp_path, place) == first


def test_a_save_that_replaces_one_of_its_size_needs_no_room_for_two(dense, tmp_path):
    adapter, place = noisy_adapter(dense), LOCATIONS["training"]
    save(adapter, tmp_path, place)
    coming = estimate_of(adapter, has_optimizer=True)
    save(adapter, tmp_path, place, budget=DiskBudget(tmp_path, limit_bytes=coming), job="m:2", overwrite=True)


def test_saves_between_two_measurements_count(tmp_path):
    budget = DiskBudget(tmp_path, limit_bytes=100, clock=ManualClock())
    budget.admit(60, what="first")
    (tmp_path / "first").write_bytes(bytes(60))
    with pytest.raises(StorageLimit):
        budget.admit(60, what="second")


def test_what_was_deleted_meanwhile_makes_room_at_once(tmp_path):
    (tmp_path / "old").write_bytes(bytes(90))
    budget = DiskBudget(tmp_path, limit_bytes=100, clock=ManualClock())
    budget.admit(5, what="first")
    (tmp_path / "old").unlink()
    budget.admit(60, what="second")


def test_what_others_wrote_meanwhile_is_seen_after_a_minute(tmp_path):
    clock = ManualClock()
    budget = DiskBudget(tmp_path, limit_bytes=100, clock=clock)
    budget.admit(5, what="first")
    (tmp_path / "log").write_bytes(bytes(90))
    clock.advance(61)
    with pytest.raises(StorageLimit):
        budget.admit(20, what="second")


@pytest.mark.parametrize("location", LOCATIONS.values(), ids=LOCATIONS.keys())
def test_a_full_disk_fails_the_save_and_leaves_nothing(dense, small_disk, location):
    adapter = noisy_adapter(dense, spec=LoraSpec(rank=32, seed=1))
    with pytest.raises(StorageFailure, match="the disk is full"):
        save(adapter, small_disk, location)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    small = noisy_adapter(dense, spec=LoraSpec(rank=1, seed=1, train_attn=False, train_mlp=False))
    save(small, small_disk, location)
