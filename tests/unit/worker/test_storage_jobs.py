"""The leader deletes checkpoints by itself, of their own tenant only, and again without harm."""

import errno
import os
from pathlib import Path

import pytest
from tests.support.worker_jobs import job

from gradstream.engine.checkpoint import copy as copying
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import MANIFEST_VERSION, Manifest, entries, verify, write_manifest
from gradstream.shared import codec
from gradstream.shared.ids import FutureId, TenantId
from gradstream.shared.wire import (
    CopyCheckpoint,
    CopyCheckpointDone,
    DeleteCheckpoint,
    DeleteCheckpointDone,
    Failed,
    LoraSpec,
)
from gradstream.worker.records import Executed, record_writes
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
        files=entries(directory),
        ttl_seconds=60,
        user_metadata={"a": "b"},
    )
    write_manifest(directory, manifest)
    return directory


def test_a_deletion_spares_a_later_save_of_the_name_and_its_record(tmp_path, saved):
    payload = codec.encode(DeleteCheckpoint(path=URI, created_ms=4))
    one = job("s:train:0", 2**31, "delete_checkpoint", payload=payload)
    outcome = storage_outcome(one, Storage(tmp_path))
    assert outcome == DeleteCheckpointDone(path=URI, was_replaced=True)
    assert record_writes(Executed(job=one, outcome=outcome)) == []
    assert saved.exists()
    payload = codec.encode(DeleteCheckpoint(path=URI, created_ms=5))
    one = job("s:train:0", 2**31, "delete_checkpoint", payload=payload)
    assert storage_outcome(one, Storage(tmp_path)) == DeleteCheckpointDone(path=URI)
    assert not saved.exists()


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


COPY = "tinker://s:train:7/weights/a"


def copy(storage: Storage, path: str = COPY, *, source: str = URI, tenant: str = "local") -> object:
    payload = codec.encode(CopyCheckpoint(source=source, path=path))
    return storage_outcome(job("s:train:7", 0, "copy_checkpoint", payload=payload, tenant=tenant), storage)


def test_a_copy_has_the_same_files_and_a_manifest_of_its_own_and_outlives_its_source(
    tmp_path: Path, saved: Path
) -> None:
    storage = Storage(tmp_path)
    source = storage.manifest(URI)
    assert copy(storage) == CopyCheckpointDone(path=COPY)
    made = storage.manifest(COPY)
    assert (made.source, made.model, made.job) == (COPY, "s:train:7", "s:train:7:0")
    assert (made.files, made.lora, made.step, made.user_metadata) == (
        source.files,
        source.lora,
        source.step,
        source.user_metadata,
    )
    assert made.expires_ms is None
    assert made.created_ms > source.created_ms
    assert copy(storage) == CopyCheckpointDone(path=COPY)
    assert storage.manifest(COPY) == made
    delete(storage)
    assert not saved.exists()
    verify(parse_uri(COPY).directory(tmp_path), made, source=COPY)


def test_a_file_system_without_hard_links_gets_copied_files(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(copying.os, "link", refuse)
    storage = Storage(tmp_path)
    assert copy(storage) == CopyCheckpointDone(path=COPY)
    verify(parse_uri(COPY).directory(tmp_path), storage.manifest(COPY), source=COPY)
    assert (saved / "adapter_model.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"tenant": "other"}, "unknown_model"),
        ({"source": "tinker://s:train:0/weights/none"}, "unknown_model"),
        ({"source": "tinker://samplers/s:sample:0"}, "invalid_request"),
        ({"path": "tinker://s:train:8/weights/a"}, "invalid_request"),
        ({"path": "tinker://samplers/s:sample:0"}, "invalid_request"),
    ],
)
def test_a_copy_that_may_not_be_leaves_nothing(tmp_path: Path, saved: Path, change: dict[str, str], code: str) -> None:
    outcome = copy(Storage(tmp_path), **change)
    assert isinstance(outcome, Failed)
    assert outcome.code == code
    assert [one.source for one in Storage(tmp_path).checkpoints()] == [URI]
    assert saved.exists()


def test_a_copy_counts_against_the_storage_limit(tmp_path: Path, saved: Path) -> None:
    outcome = copy(Storage(tmp_path, limit_bytes=10_000))
    assert isinstance(outcome, Failed)
    assert outcome.code == "storage_limit"
    assert saved.exists()
