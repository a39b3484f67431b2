"""The worker's view of the output directory."""

import os
from pathlib import Path

import pytest
from tests.support.saved import write_save

from gradstream.shared.errors import StorageFailure
from gradstream.worker.storage import Storage

URI = "tinker://m/weights/a"


def folder(root: Path) -> Path:
    return root / "checkpoints" / "m" / "weights" / "a"


def test_a_changed_time_to_live_is_in_the_manifest(tmp_path):
    write_save(tmp_path, URI, created_ms=1000)
    storage = Storage(tmp_path)
    assert storage.change_ttl(URI, created_ms=1000, expires_ms=61_000)
    assert storage.manifest(URI).expires_ms == 61_000
    assert not storage.change_ttl(URI, created_ms=1000, expires_ms=61_000)
    assert storage.change_ttl(URI, created_ms=1000, expires_ms=70_001)
    assert storage.manifest(URI).expires_ms == 71_000
    assert storage.change_ttl(URI, created_ms=1000, expires_ms=None)
    assert storage.manifest(URI).expires_ms is None
    assert sorted(path.name for path in folder(tmp_path).iterdir()) == ["data", "manifest.json"]


def test_a_later_save_keeps_its_own_time_to_live(tmp_path):
    write_save(tmp_path, URI, created_ms=2000)
    assert not Storage(tmp_path).change_ttl(URI, created_ms=1000, expires_ms=61_000)
    assert Storage(tmp_path).manifest(URI).ttl_seconds is None


def test_a_damaged_manifest_is_not_replaced(tmp_path):
    write_save(tmp_path, URI, created_ms=1000)
    (folder(tmp_path) / "manifest.json").write_text("{")
    with pytest.raises(StorageFailure, match="damaged"):
        Storage(tmp_path).change_ttl(URI, created_ms=1000, expires_ms=61_000)
    assert list(Storage(tmp_path).checkpoints()) == []


def test_only_old_leftovers_are_removed(tmp_path):
    write_save(tmp_path, URI, created_ms=1000)
    write_save(tmp_path, "tinker://samplers/s:sample:1", created_ms=1000)
    kinds = folder(tmp_path).parent
    names = [kinds / ".a.x.tmp", kinds / ".removed-b", tmp_path / "samplers" / ".removed-c"]
    for path in names:
        path.mkdir()
        os.utime(path, (10, 10))
    young = kinds / ".a.y.tmp"
    young.mkdir()
    os.utime(folder(tmp_path), (10, 10))
    assert Storage(tmp_path).remove_leftovers(before_ms=20_000) == 3
    assert [path.exists() for path in names] == [False] * 3
    assert young.exists()
    assert folder(tmp_path).exists()


def test_checkpoints_and_snapshots_are_told_apart(tmp_path):
    write_save(tmp_path, URI, created_ms=1000)
    write_save(tmp_path, "tinker://samplers/s:sample:1", created_ms=1000)
    storage = Storage(tmp_path)
    assert [manifest.source for manifest in storage.checkpoints()] == [URI]
    assert [manifest.source for manifest in storage.samplers()] == ["tinker://samplers/s:sample:1"]
    assert storage.snapshots().keys() == {"s+sample+1"}
