"""What a writer puts into the log, and what a reader gets from it."""

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.disklog import batch, entry, frames, future, last_segment, open_writer, run_jobs, succeed

from gradstream.shared import codec
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog import writer as writer_module
from gradstream.worker.disklog.errors import SyncFailed, UnknownPosition
from gradstream.worker.disklog.frames import (
    Dropped,
    LoggedBatch,
    LoggedJob,
    Position,
    SegmentHead,
    Started,
    Stopped,
)
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.segments import segment_paths


def test_frames_come_back_in_the_order_of_writing(tmp_path: Path):
    writer = open_writer(tmp_path / "log")
    writer.append_jobs([entry(1), entry(2)])
    writer.append_started(1, [future(1)])
    writer.append_batch(batch(1, [future(1)]))
    writer.append_dropped([future(2)])
    writer.append_stopped([future(2)])
    writer.close()

    head, *rest = frames(tmp_path / "log")

    assert isinstance(head, SegmentHead)
    assert (head.engine, head.epoch, head.index, head.fingerprint, head.after) == ("main", 1, 0, "torch=1", None)
    assert rest == [
        LoggedJob(entry_id="1-0", at_ms=1_700_000_000_001, job=entry(1).job),
        LoggedJob(entry_id="2-0", at_ms=1_700_000_000_002, job=entry(2).job),
        Started(epoch=1, number=1, future_ids=[future(1)]),
        batch(1, [future(1)]),
        Dropped(future_ids=[future(2)]),
        Stopped(epoch=1, future_ids=[future(2)]),
    ]


def test_a_payload_that_came_packed_lies_on_disk_as_it_came_and_is_read_as_any_other(tmp_path: Path):
    payload = bytes(range(256)) * 100
    packed = codec.compress(payload)
    plain = entry(1, payload=payload)
    writer = open_writer(tmp_path / "log")
    writer.append_jobs([replace(plain, frame=packed), entry(2)])
    writer.close()

    _, *rest = frames(tmp_path / "log")

    assert rest == [
        LoggedJob(entry_id="1-0", at_ms=plain.at_ms, job=plain.job),
        LoggedJob(entry_id="2-0", at_ms=entry(2).at_ms, job=entry(2).job),
    ]
    (segment,) = segment_paths(tmp_path / "log")
    assert packed in segment.read_bytes()


def test_a_log_that_does_not_exist_is_empty(tmp_path: Path):
    log = DiskLog(tmp_path / "none")

    tail = log.tail()

    assert list(log.scan()) == []
    assert (tail.last, tail.end, tail.epoch, tail.last_entry, tail.fingerprint) == (None, None, 0, 0, None)


def test_what_is_appended_is_readable_before_any_sync(tmp_path: Path):
    writer = open_writer(tmp_path)
    position = writer.append_batch(batch(1, [future(1)]))

    assert list(DiskLog(tmp_path).scan(position)) == [(position, batch(1, [future(1)]))]
    writer.close()


def test_a_scan_from_any_position_is_the_end_of_the_whole_scan(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 15))
    end = writer.position()
    writer.close()
    everything = list(DiskLog(tmp_path).scan())

    for index, (position, _) in enumerate(everything):
        assert list(DiskLog(tmp_path).scan(position)) == everything[index:]
    assert list(DiskLog(tmp_path).scan(end)) == []


def test_segments_are_rotated_and_read_as_one_log(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 15))
    writer.close()

    batches = [frame for frame in frames(tmp_path) if isinstance(frame, LoggedBatch)]

    assert len(list(tmp_path.glob("*.seg"))) > 2
    assert all(path.stat().st_size < 2500 for path in tmp_path.glob("*.seg"))
    assert [frame.number for frame in batches] == list(range(1, 15))


def test_a_job_that_is_open_in_the_log_is_not_written_again(tmp_path: Path):
    writer = open_writer(tmp_path)
    first = writer.append_jobs([entry(1)])
    again = writer.append_jobs([entry(1), entry(2)])
    writer.close()
    writer = succeed(tmp_path)
    by_successor = writer.append_jobs([entry(1), entry(2), entry(3)])
    writer.close()

    assert (set(first), set(again), set(by_successor)) == ({future(1)}, {future(2)}, {future(3)})
    assert len([frame for frame in frames(tmp_path) if isinstance(frame, LoggedJob)]) == 3


def test_a_job_with_an_outcome_is_not_written(tmp_path: Path):
    writer = open_writer(tmp_path)

    assert writer.append_jobs([replace(entry(1), is_open=False)]) == {}
    writer.close()


def test_positions_of_jobs_are_where_they_stand(tmp_path: Path):
    writer = open_writer(tmp_path)
    positions = writer.append_jobs([entry(number, payload=bytes(number)) for number in range(5)])
    writer.close()

    for number in range(5):
        _, frame = next(DiskLog(tmp_path).scan(positions[future(number)]))
        assert isinstance(frame, LoggedJob)
        assert frame.job == entry(number, payload=bytes(number)).job


def test_the_tail_tells_open_jobs_their_starts_and_where_the_log_goes_on(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    positions = writer.append_jobs([entry(3), entry(4), entry(5), entry(6)])
    writer.append_started(3, [future(3), future(4)])
    writer.append_dropped([future(5)])
    writer.close()
    writer = succeed(tmp_path)
    writer.append_started(1, [future(3), future(4)])
    writer.append_stopped([future(4)])
    end = writer.position()
    writer.close()

    tail = DiskLog(tmp_path).tail()

    assert tail.last == BatchId(1, 2)
    assert tail.end == end
    assert {future_id: position for future_id, (position, _) in tail.open_jobs.items()} == {
        future_id: positions[future_id] for future_id in (future(3), future(4), future(6))
    }
    assert tail.starts == {future(3): {1, 2}, future(4): {1}}
    assert (tail.epoch, tail.last_entry, tail.fingerprint) == (2, 6, "torch=1")


def test_the_tail_of_a_log_without_jobs_knows_the_last_entry_from_the_cursor(tmp_path: Path):
    writer = open_writer(tmp_path)
    writer.append_batch(batch(1, [future(1)], cursor="41-0"))
    writer.close()

    assert DiskLog(tmp_path).tail().last_entry == 41


def test_batches_out_of_order_are_refused(tmp_path: Path):
    writer = open_writer(tmp_path, epoch=2)
    writer.append_batch(batch(7, [future(1)], epoch=1))
    writer.append_batch(batch(1, [future(2)], epoch=2))

    with pytest.raises(ValueError, match="batch 2-1 does not come after batch 2-1"):
        writer.append_batch(batch(1, [future(3)], epoch=2))
    with pytest.raises(ValueError, match="batch 3-1 is not one of epoch 2 or before"):
        writer.append_batch(batch(1, [future(3)], epoch=3))
    writer.close()


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_epoch_that_is_not_the_newest_cannot_open_the_log(tmp_path: Path, epoch: int):
    open_writer(tmp_path, epoch=2).close()

    with pytest.raises(ValueError, match="take a higher epoch"):
        open_writer(tmp_path, epoch=epoch)


def test_only_the_owner_may_read_the_log(tmp_path: Path):
    writer = open_writer(tmp_path / "deep" / "log", segment_bytes=1500)
    run_jobs(writer, range(10))
    writer.close()

    assert stat.S_IMODE((tmp_path / "deep" / "log").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "log").iterdir()} == {0o600}


def test_a_closed_writer_takes_nothing(tmp_path: Path):
    writer = open_writer(tmp_path)
    writer.close()
    writer.close()

    with pytest.raises(ValueError, match="closed"):
        writer.append_started(1, [future(1)])


def test_a_position_behind_the_end_is_not_on_the_log(tmp_path: Path):
    writer = open_writer(tmp_path)
    end = writer.position()
    writer.close()

    with pytest.raises(UnknownPosition):
        list(DiskLog(tmp_path).scan(Position(end.segment, end.offset + 1)))
    with pytest.raises(UnknownPosition):
        list(DiskLog(tmp_path).scan(Position("00000009-000000.seg", 0)))


def test_many_threads_append_whole_frames(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=20_000)
    barrier = threading.Barrier(64)

    def append(thread: int) -> None:
        barrier.wait(timeout=120)
        for number in range(8):
            model = f"s:train:{thread}"
            writer.append_jobs([entry(number, model=model, payload=os.urandom(thread * 40))])
            writer.append_started(number, [future(number, model)])
            writer.sync()

    threads = [threading.Thread(target=append, args=(thread,)) for thread in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()

    started = [frame.future_ids[0] for frame in frames(tmp_path) if isinstance(frame, Started)]
    expected = {future(number, f"s:train:{thread}") for thread in range(64) for number in range(8)}
    assert len(started) == len(expected)
    assert set(started) == expected
    assert list(DiskLog(tmp_path).tail().open_jobs) == jobs_in_order(tmp_path)


def jobs_in_order(directory: Path) -> list[FutureId]:
    return [frame.job.future_id for frame in frames(directory) if isinstance(frame, LoggedJob)]


@pytest.mark.parametrize(("sync", "num_syncs"), [("always", 3), ("no", 0)])
def test_a_batch_is_synced_before_the_call_returns_only_with_always(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: writer_module.Sync, num_syncs: int
):
    synced: list[int] = []
    monkeypatch.setattr(writer_module, "sync_data", synced.append)
    writer = open_writer(tmp_path, sync=sync)

    run_jobs(writer, range(3))

    assert len(synced) == num_syncs
    writer.close()


def test_with_everysec_a_thread_syncs_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    was_synced = threading.Event()
    monkeypatch.setattr(writer_module, "_SYNC_INTERVAL_S", 0.01)
    monkeypatch.setattr(writer_module, "sync_data", lambda _: was_synced.set())
    writer = open_writer(tmp_path, sync="everysec")
    writer.append_started(1, [future(1)])

    assert was_synced.wait(timeout=120)
    writer.close()


def test_after_a_failed_sync_nothing_is_taken_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    writer = open_writer(tmp_path, sync="always")
    monkeypatch.setattr(writer_module, "sync_data", fail)

    with pytest.raises(SyncFailed, match="Input/output error"):
        writer.append_batch(batch(1, [future(1)]))
    monkeypatch.undo()
    with pytest.raises(SyncFailed):
        writer.append_started(2, [future(2)])
    with pytest.raises(SyncFailed):
        writer.close()
    assert [frame.number for frame in frames(tmp_path) if isinstance(frame, LoggedBatch)] == [1]
    assert last_segment(tmp_path).name == "00000001-000000.seg"
