"""What a refill writes of checkpoints: what their manifests on disk tell now."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import msgspec
import pytest

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import FileEntry, Manifest, write_manifest
from gradstream.shared.ids import LOCAL_TENANT, FutureId
from gradstream.shared.joblog.port import BatchId, Commit, Feed, LogEntry, RecordKind, RecordWrite
from gradstream.shared.wire import LoraSpec, Plan
from gradstream.worker.disklog.frames import LoggedBatch, LoggedRecord
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.records import checkpoint_fields
from gradstream.worker.recovery.agree import make_up
from gradstream.worker.recovery.past import Past
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.storage import Storage

URI = "tinker://s:train:1/weights/first"
MANIFEST = Manifest(
    version=1,
    kind="weights",
    source=URI,
    model="s:train:1",
    job=FutureId("s:train:1:4"),
    tenant=LOCAL_TENANT,
    base_model="tiny",
    lora=LoraSpec(rank=8, seed=5),
    scale=4.0,
    step=3,
    has_optimizer=True,
    created_ms=1_000,
    files={"a": FileEntry(size_bytes=7, sha256="00")},
    ttl_seconds=60,
)


class Redis:
    """One that has the first batch, and keeps what is committed."""

    def __init__(self) -> None:
        self.commits: list[Commit] = []

    def last_batch(self) -> BatchId:
        return BatchId(1, 1)

    def unknown(self, future_ids: list[FutureId]) -> set[FutureId]:
        return set(future_ids)

    def restore(self, entry: LogEntry, *, epoch: int, ended_ms: int) -> bool:
        raise AssertionError((entry, epoch, ended_ms))

    def commit(self, commit: Commit) -> None:
        self.commits.append(commit)


def committed(tmp_path: Path, fields: Mapping[str, str] | None, storage: Storage | None) -> list[RecordWrite]:
    """The records that a take-over commits for a batch that wrote fields for the checkpoint."""
    record = LoggedRecord(
        kind=RecordKind.CHECKPOINT, record_id=URI, fields=dict(fields) if fields is not None else None
    )
    plan = Plan(kind="save_weights", future_ids=[], row_budget_tokens=0)
    frame = LoggedBatch(epoch=1, number=2, plan=plan, outcomes=[], cursor="9-0", at_ms=77, records=[record])
    batch = PastBatch(batch=frame.batch_id, plan=plan, ended=[], sources={}, at_ms=77)
    past = Past(
        is_whole=True,
        ids=[BatchId(1, 1), frame.batch_id],
        batches=[batch],
        frames=[frame],
        jobs_of={frame.batch_id: []},
    )
    redis = Redis()
    assert make_up(cast("Feed", redis), DiskLog(tmp_path), past, epoch=2, storage=storage) == 1
    (commit,) = redis.commits
    assert (commit.batch, commit.at_ms) == (frame.batch_id, 77)
    return list(commit.records)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path)


def put(tmp_path: Path, manifest: Manifest) -> None:
    directory = parse_uri(URI).directory(tmp_path)
    directory.mkdir(parents=True)
    write_manifest(directory, manifest)


def test_a_checkpoint_whose_time_to_live_was_changed_gets_the_record_that_it_has_now(
    tmp_path: Path, storage: Storage
) -> None:
    now = msgspec.structs.replace(MANIFEST, ttl_seconds=None)
    put(tmp_path, now)
    (write,) = committed(tmp_path, checkpoint_fields(MANIFEST), storage)
    assert (write.record_id, write.fields) == (URI, checkpoint_fields(now))


def test_a_checkpoint_that_is_gone_gets_no_record(tmp_path: Path, storage: Storage) -> None:
    assert committed(tmp_path, checkpoint_fields(MANIFEST), storage) == []


def test_a_removal_stays_one_also_when_the_checkpoint_lies_there(tmp_path: Path, storage: Storage) -> None:
    put(tmp_path, MANIFEST)
    (write,) = committed(tmp_path, None, storage)
    assert write.fields is None


def test_a_checkpoint_that_cannot_be_read_keeps_the_record_that_was_logged(tmp_path: Path, storage: Storage) -> None:
    put(tmp_path, MANIFEST)
    (parse_uri(URI).directory(tmp_path) / "manifest.json").write_bytes(b"{")
    (write,) = committed(tmp_path, checkpoint_fields(MANIFEST), storage)
    assert write.fields == checkpoint_fields(MANIFEST)
