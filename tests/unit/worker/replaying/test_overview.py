"""Who has to be replayed with whom."""

import pytest
from tests.support.disklog import batch as logged
from tests.support.disklog import entry, future, open_writer

from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.overview import Note, Overview, closed, overview


def note(number: int, *owners: str, kind: str = "forward_backward", **fields: frozenset[str]) -> Note:
    return Note(batch=BatchId(1, number), kind=kind, owners=frozenset(owners), futures=(), **fields)


def test_models_that_shared_a_batch_are_needed_and_theirs_too():
    notes = [note(1, "a"), note(2, "a", "b"), note(3, "b", "c"), note(4, "d")]
    assert Overview().needed("a", notes) == {"a", "b", "c"}
    assert Overview().needed("d", notes) == {"d"}


def test_a_batch_of_samples_links_nobody():
    notes = [note(1, "a"), note(2, "a", "b", kind="sample")]
    assert Overview().needed("a", notes) == {"a"}


def test_who_saved_a_checkpoint_is_needed_by_who_loaded_it():
    notes = [
        note(1, "a", kind="save_weights", saves=frozenset({"tinker://a/weights/x"})),
        note(2, "b", kind="load_weights", loads=frozenset({"tinker://a/weights/x"})),
        note(3, "c", kind="load_weights", loads=frozenset({"tinker://z/weights/old"})),
    ]
    assert Overview().needed("b", notes) == {"a", "b"}
    assert Overview().needed("c", notes) == {"c"}


def test_a_model_without_a_job_is_refused():
    with pytest.raises(CannotReplay, match="no job of x"):
        Overview().needed("x", [note(1, "a")])


def test_links_are_followed_to_their_end():
    groups = [frozenset({"c", "d"}), frozenset({"b", "c"}), frozenset({"a", "b"}), frozenset({"e", "f"})]
    assert closed(frozenset({"a"}), groups) == {"a", "b", "c", "d"}


def test_jobs_are_found_by_future_and_by_batch_and_open_ones_are_told_apart(tmp_path):
    writer = open_writer(tmp_path / "log")
    writer.append_jobs([entry(1), entry(2), entry(3)])
    writer.append_batch(logged(4, [future(1)]))
    writer.append_batch(logged(5, [future(2)]))
    writer.close()
    seen = overview(DiskLog(tmp_path / "log"))
    assert (seen.find(future(2)), seen.find("1-4")) == (1, 0)
    assert [one.is_partial for one in seen.batches] == [False, False]
    with pytest.raises(CannotReplay, match="has no outcome"):
        seen.find(future(3))
    with pytest.raises(CannotReplay, match="is not in this log"):
        seen.find("1-9")


def test_a_batch_whose_job_the_log_does_not_hold_any_more_is_partial(tmp_path):
    writer = open_writer(tmp_path / "log")
    writer.append_jobs([entry(1)])
    writer.append_batch(logged(1, [future(1), future(2)]))
    writer.close()
    assert [one.is_partial for one in overview(DiskLog(tmp_path / "log")).batches] == [True]
