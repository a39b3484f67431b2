"""A log as one file, and as a log again."""

import stat
from pathlib import Path

import msgspec
import pytest
from tests.support.disklog import batch, entry, frames, future, open_writer, run_jobs, succeed

from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import StorageFailure
from gradstream.shared.joblog.port import BatchId, RecordKind
from gradstream.worker.disklog.archive import archive_frames, export_log, import_log
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.frames import (
    Frame,
    LoggedBatch,
    LoggedJob,
    LoggedRecord,
    SegmentHead,
    Selection,
    SelectionEnd,
)
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice

pytestmark = pytest.mark.usefixtures("no_fsync")

A, B, C, D = (f"s:train:{n}" for n in range(4))


def export(directory: Path, file: Path, choice: Choice | None = None) -> SelectionEnd:
    return export_log(DiskLog(directory), file, choice or Choice(), clock=ManualClock())


def imported(file: Path, directory: Path) -> list[Frame]:
    """The frames of the log made from the file, without the heads."""
    import_log(file, directory)
    return without_heads(directory)


def without_heads(directory: Path) -> list[Frame]:
    return [frame for frame in frames(directory) if not isinstance(frame, SegmentHead)]


def log_of_four_models(directory: Path) -> None:
    """A runs alone, A with B, B with C, D alone; every job is logged at once, D's second stays open."""
    writer = open_writer(directory)
    for model in (A, B, C, D):
        writer.append_jobs([entry(seq, model=model) for seq in (1, 2)])
    writer.append_started(1, [future(1, A)])
    writer.append_batch(batch(1, [future(1, A)]))
    shared = batch(2, [future(2, A), future(1, B)])
    records = [
        LoggedRecord(kind=RecordKind.MODEL, record_id=A, fields={"state": "ready"}),
        LoggedRecord(kind=RecordKind.CHECKPOINT, record_id=f"tinker://{B}/weights/x", fields={"secret": "of B"}),
    ]
    sources = {future(2, A): "a", future(1, B): "b"}
    writer.append_batch(msgspec.structs.replace(shared, records=records, sources=sources))
    writer.append_batch(batch(3, [future(2, B), future(1, C)]))
    writer.append_batch(batch(4, [future(1, D)]))
    writer.append_batch(batch(5, [future(2, C)]))
    writer.close()


def jobs(log: list[Frame]) -> list[str]:
    return [frame.job.future_id for frame in log if isinstance(frame, LoggedJob)]


def batches(log: list[Frame]) -> list[LoggedBatch]:
    return [frame for frame in log if isinstance(frame, LoggedBatch)]


def test_a_whole_log_comes_back_frame_by_frame(tmp_path: Path):
    writer = open_writer(tmp_path / "log", segment_bytes=1500)
    run_jobs(writer, range(1, 10), payload=bytes(range(256)) * 10)
    writer.append_jobs([entry(10)])
    writer.append_started(10, [future(10)])
    writer.close()
    successor = succeed(tmp_path / "log")
    run_jobs(successor, [11], epoch=2)
    successor.close()

    end = export(tmp_path / "log", tmp_path / "a.gslog")
    log = imported(tmp_path / "a.gslog", tmp_path / "copy")

    assert log == without_heads(tmp_path / "log")
    assert end == SelectionEnd(num_jobs=11, num_batches=10, num_partial=0)
    before, after = DiskLog(tmp_path / "log").tail(), DiskLog(tmp_path / "copy").tail()
    assert (after.last, after.starts, after.epoch, after.fingerprint) == (
        before.last,
        before.starts,
        before.epoch,
        before.fingerprint,
    )


def test_an_imported_log_can_be_gone_on_with(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    export(tmp_path / "log", tmp_path / "a.gslog")
    import_log(tmp_path / "a.gslog", tmp_path / "copy")

    successor = succeed(tmp_path / "copy")
    run_jobs(successor, [50], epoch=2)
    successor.close()

    assert DiskLog(tmp_path / "copy").tail().last == BatchId(2, 50)


def test_files_are_for_their_owner_only_and_leave_no_drafts(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    export(tmp_path / "log", tmp_path / "a.gslog")
    import_log(tmp_path / "a.gslog", tmp_path / "copy")

    assert stat.S_IMODE((tmp_path / "a.gslog").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "copy").iterdir()} == {0o600}
    assert {path.name for path in tmp_path.iterdir()} == {"log", "a.gslog", "copy"}


def test_one_model_keeps_its_jobs_and_shared_batches_are_partial(tmp_path: Path):
    log_of_four_models(tmp_path / "log")

    end = export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=[A]))
    log = imported(tmp_path / "a.gslog", tmp_path / "copy")

    assert jobs(log) == [future(1, A), future(2, A)]
    alone, shared = batches(log)
    assert not alone.partial
    assert shared.partial
    assert shared.plan.future_ids == [future(2, A), future(1, B)]
    assert [outcome.future_id for outcome in shared.outcomes] == [future(2, A)]
    assert [record.record_id for record in shared.records] == [A]
    assert shared.sources == {future(2, A): "a"}
    assert end == SelectionEnd(num_jobs=2, num_batches=2, num_partial=1)
    assert b"of B" not in (tmp_path / "a.gslog").read_bytes()


def test_one_model_with_its_neighbours_has_only_whole_batches(tmp_path: Path):
    log_of_four_models(tmp_path / "log")

    end = export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=[A], with_neighbours=True))
    selection = import_log(tmp_path / "a.gslog", tmp_path / "copy")
    log = without_heads(tmp_path / "copy")

    assert (selection.owners, selection.asked) == ([A, B, C], [A])
    assert [frame.number for frame in batches(log)] == [1, 2, 3, 5]
    assert batches(log)[1] == batches(without_heads(tmp_path / "log"))[1]
    assert len(jobs(log)) == 6
    assert end.num_partial == 0


def test_models_that_only_sampled_together_are_no_neighbours(tmp_path: Path):
    writer = open_writer(tmp_path / "log")
    for model in (A, B):
        writer.append_jobs([entry(1, model=model)])
    writer.append_batch(batch(1, [future(1, A), future(1, B)], kind="sample"))
    writer.close()

    export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=[A], with_neighbours=True))

    assert jobs(imported(tmp_path / "a.gslog", tmp_path / "copy")) == [future(1, A)]


@pytest.mark.parametrize(
    ("start", "stop", "numbers", "num_jobs"),
    [(None, 2, [1, 2], 3), (3, None, [3, 4, 5], 5), (2, 3, [2, 3], 4)],
    ids=["to-2", "from-3-with-open-jobs", "2-to-3"],
)
def test_a_range_has_its_batches_and_their_jobs(
    tmp_path: Path, start: int | None, stop: int | None, numbers: list[int], num_jobs: int
):
    log_of_four_models(tmp_path / "log")
    choice = Choice(start=None if start is None else BatchId(1, start), stop=None if stop is None else BatchId(1, stop))

    end = export(tmp_path / "log", tmp_path / "a.gslog", choice)
    log = imported(tmp_path / "a.gslog", tmp_path / "copy")

    assert [frame.number for frame in batches(log)] == numbers
    assert len(jobs(log)) == num_jobs
    assert {future_id for frame in batches(log) for future_id in frame.plan.future_ids} <= set(jobs(log))
    assert end.num_partial == 0


def test_a_range_that_ends_before_damage_can_be_saved(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    (path,) = (tmp_path / "log").glob("*.seg")
    position = [position for position, frame in DiskLog(tmp_path / "log").scan() if isinstance(frame, LoggedBatch)][2]
    data = bytearray(path.read_bytes())
    data[position.offset + 20] ^= 1
    path.write_bytes(data)

    with pytest.raises(LogDamaged):
        export(tmp_path / "log", tmp_path / "a.gslog")
    export(tmp_path / "log", tmp_path / "a.gslog", Choice(stop=BatchId(1, 2)))

    assert len(batches(imported(tmp_path / "a.gslog", tmp_path / "copy"))) == 2


def test_nothing_chosen_is_an_error_and_leaves_no_file(tmp_path: Path):
    log_of_four_models(tmp_path / "log")

    with pytest.raises(ValueError, match="nothing in the job log"):
        export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=["s:train:9"]))
    assert not (tmp_path / "a.gslog").exists()


def test_what_is_there_is_not_replaced(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    export(tmp_path / "log", tmp_path / "a.gslog")

    with pytest.raises(FileExistsError):
        export(tmp_path / "log", tmp_path / "a.gslog")
    with pytest.raises(FileExistsError):
        import_log(tmp_path / "a.gslog", tmp_path / "log")


def test_a_file_cut_anywhere_is_not_whole(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=[D]))
    data = (tmp_path / "a.gslog").read_bytes()

    for size in range(0, len(data), 5):
        (tmp_path / "cut.gslog").write_bytes(data[:size])
        with pytest.raises(LogDamaged):
            list(archive_frames(tmp_path / "cut.gslog"))
    with pytest.raises(LogDamaged):
        import_log(tmp_path / "cut.gslog", tmp_path / "copy")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "a.gslog", "cut.gslog"}


def test_an_exported_file_begins_with_what_it_holds(tmp_path: Path):
    log_of_four_models(tmp_path / "log")
    export(tmp_path / "log", tmp_path / "a.gslog", Choice(owners=[B, A], start=BatchId(1, 2), stop=BatchId(1, 4)))

    selection = next(archive_frames(tmp_path / "a.gslog"))

    assert isinstance(selection, Selection)
    assert (selection.engine, selection.fingerprint) == ("main", "torch=1")
    assert (selection.owners, selection.asked, selection.start, selection.stop) == ([A, B], None, "1-2", "1-4")


def test_a_segment_of_a_log_is_no_exported_file(tmp_path: Path):
    log_of_four_models(tmp_path / "log")

    with pytest.raises(LogDamaged, match="does not begin like an exported job log"):
        import_log(tmp_path / "log" / "00000001-000000.seg", tmp_path / "copy")


def test_an_export_makes_no_directories(tmp_path):
    log_of_four_models(tmp_path / "log")
    with pytest.raises(StorageFailure, match="No such file or directory"):
        export(tmp_path / "log", tmp_path / "mistyped" / "e.gslog")
    assert not (tmp_path / "mistyped").exists()
