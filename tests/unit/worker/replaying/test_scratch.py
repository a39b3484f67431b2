"""Checkpoints of a replay: made anew, or brought from an original directory that is only read."""

from pathlib import Path

import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared import codec
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.port import BatchId, Ended, RecordKind
from gradstream.shared.wire import (
    CopyCheckpoint,
    CopyCheckpointDone,
    Job,
    LoadWeights,
    LoadWeightsDone,
    Outcome,
    Payload,
    Plan,
    SaveWeights,
    SaveWeightsDone,
)
from gradstream.worker.disklog.frames import LoggedBatch, LoggedRecord
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.scratch import Scratch
from gradstream.worker.storage import Storage

MODEL = ModelId("s:train:1")
COPY = ModelId("s:train:2")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """An output directory with checkpoint `a` of the model."""
    driver = Driver(open_engine(output_dir=tmp_path / "original"))
    driver.create(MODEL)
    driver.done(MODEL, cross_entropy(random_data([5])))
    driver.step(MODEL)
    driver.done(MODEL, SaveWeights(name="a"))
    return tmp_path / "original"


URI = f"tinker://{MODEL}/weights/a"


def job(payload: Payload, *, owner: ModelId = MODEL) -> Job:
    return Job(
        future_id=FutureId(f"{owner}:1"),
        owner=owner,
        seq=1,
        op=codec.op_of(payload),
        tenant=LOCAL_TENANT,
        payload=codec.encode(payload),
    )


def past(one: Job, outcome: Outcome, *, source: str | None = None) -> PastBatch:
    plan = Plan(kind=one.op, future_ids=[one.future_id], row_budget_tokens=1)
    sources = {} if source is None else {one.future_id: source}
    return PastBatch(batch=BatchId(1, 1), plan=plan, ended=[Ended.of(one, outcome)], sources=sources)


def a_load(*, source: str | None) -> PastBatch:
    done = LoadWeightsDone(path=URI, model_id=MODEL)
    return past(job(LoadWeights(path=URI, with_optimizer=True)), done, source=source)


def content(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_checkpoint_of_before_is_brought_and_the_original_stays_as_it_was(tmp_path, original):
    before = content(original)
    scratch = Scratch(tmp_path / "scratch", original=original, compares=True)
    assert scratch.prepare(a_load(source=Storage(original).source(URI))) == {}
    assert content(parse_uri(URI).directory(tmp_path / "scratch")) == content(parse_uri(URI).directory(original))
    saved = past(job(SaveWeights(name="a")), SaveWeightsDone(path=URI))
    scratch.prepare(saved)
    assert not parse_uri(URI).directory(tmp_path / "scratch").exists()
    assert content(original) == before


@pytest.mark.parametrize("has_original", [True, False])
def test_a_checkpoint_that_is_nowhere_cannot_be_loaded(tmp_path, has_original):
    scratch = Scratch(tmp_path / "scratch", original=tmp_path if has_original else None, compares=True)
    with pytest.raises(CannotReplay, match="is missing"):
        scratch.prepare(a_load(source=None))


def test_another_checkpoint_of_the_name_is_refused_unless_numbers_may_differ(tmp_path, original):
    with pytest.raises(CannotReplay, match="was replaced"):
        Scratch(tmp_path / "exact", original=original, compares=True).prepare(a_load(source="0" * 32))
    assert Scratch(tmp_path / "near", original=original, compares=False).prepare(a_load(source="0" * 32)) == {}


def test_a_copy_is_made_here_with_the_time_that_it_had(tmp_path, original):
    before = content(original)
    target = f"tinker://{COPY}/weights/a"
    copy = job(CopyCheckpoint(source=URI, path=target), owner=COPY)
    scratch = Scratch(tmp_path / "scratch", original=original, compares=True)
    outcome = scratch.repeat(copy)
    assert outcome == CopyCheckpointDone(path=target)
    record = LoggedRecord(kind=RecordKind.CHECKPOINT, record_id=target, fields={"created_ms": "12345"})
    plan = Plan(kind="refused", future_ids=[copy.future_id], row_budget_tokens=0)
    frame = LoggedBatch(epoch=1, number=2, plan=plan, outcomes=[], cursor="0-0", at_ms=0, records=[record])
    scratch.settle(frame, {copy.future_id: outcome})
    assert Storage(tmp_path / "scratch").manifest(target).created_ms == 12345
    assert scratch.was_saved(target)
    assert content(original) == before


def test_a_copy_of_what_is_gone_is_left_out(tmp_path):
    copy = job(CopyCheckpoint(source=URI, path=f"tinker://{COPY}/weights/a"), owner=COPY)
    assert Scratch(tmp_path / "scratch", original=tmp_path, compares=True).repeat(copy) is None
