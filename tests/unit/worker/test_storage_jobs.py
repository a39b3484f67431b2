"""The leader deletes checkpoints by itself, of their own tenant only, and again without harm."""

from pathlib import Path

import pytest
from tests.support.worker_jobs import job

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import MANIFEST_VERSION, Manifest, write_manifest
from gradstream.shared import codec
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.wire import DeleteCheckpoint, DeleteCheckpointDone, Failed, LoraSpec
from gradstream.worker.storage import Storage
from gradstream.worker.storage_jobs import storage_outcome

URI = "tinker://s:train:0/weights/a"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The directory of a checkpoint of the local tenant."""
    directory = parse_uri(URI).directory(tmp_path)
    directory.mkdir(parents=True)
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    manifest = Manifest(
        version=MANIFEST_VERSION,
        kind="weights",
        source=URI,
        job=FutureId("s:train:0:1"),
        model="s:train:0",
        tenant=TenantId("local"),
        base_model="tiny",
        lora=LoraSpec(rank=4, seed=1),
        scale=1.0,
        step=1,
        has_optimizer=False,
        created_ms=5,
        files={},
    )
    write_manifest(directory, manifest)
    return directory


def delete(storage: Storage, path: str = URI, *, tenant: str = "local") -> object:
    payload = codec.encode(DeleteCheckpoint(path=path))
    return storage_outcome(job("s:train:0", 2**31, "delete_checkpoint", payload=payload, tenant=tenant), storage)


def test_a_checkpoint_is_deleted_and_deleting_it_again_is_the_same(tmp_path: Path, saved: Path) -> None:
    storage = Storage(tmp_path)
    assert delete(storage) == DeleteCheckpointDone(path=URI)
    assert not saved.exists()
    assert list(saved.parent.iterdir()) == []
    assert delete(storage) == DeleteCheckpointDone(path=URI)


def test_another_tenants_checkpoint_is_left_alone(tmp_path: Path, saved: Path) -> None:
    outcome = delete(Storage(tmp_path), tenant="other")
    assert isinstance(outcome, Failed)
    assert outcome.code == "unknown_model"
    assert saved.exists()


@pytest.mark.parametrize("path", ["tinker://../../etc", "tinker://m/weights/..", "x", "tinker://m/else/a"])
def test_a_path_that_is_none_fails_the_job(tmp_path: Path, path: str) -> None:
    outcome = delete(Storage(tmp_path), path)
    assert isinstance(outcome, Failed)
    assert outcome.category == "user"


def test_other_jobs_are_left_to_the_engine(tmp_path: Path) -> None:
    assert storage_outcome(job("s:train:0", 1, "optim_step"), Storage(tmp_path)) is None
