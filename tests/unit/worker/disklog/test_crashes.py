"""What is left of the log after kills, power cuts, damage and gangs that wake up too late."""

import multiprocessing
import os
import random
import resource
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from tests.support.disklog import batch, entry, frames, future, last_segment, open_writer, run_jobs, succeed

from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import StorageFailure
from gradstream.shared.joblog.port import Fenced
from gradstream.worker.disklog.errors import LogDamaged, UnknownPosition
from gradstream.worker.disklog.frames import Frame, LoggedBatch, LoggedJob, SegmentHead, Started
from gradstream.worker.disklog.log import DiskLog

# Children begin with everything imported, so that many can be killed in a second.
_FORK = multiprocessing.get_context("fork")


def flip(path: Path, at: int) -> None:
    """Flip one bit of the byte at an offset."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def test_a_log_cut_at_any_byte_of_its_last_frames_ends_with_the_last_whole_one(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2, 3])
    end = writer.position().offset
    writer.close()
    everything = list(DiskLog(tmp_path).scan())
    path = last_segment(tmp_path)
    data = path.read_bytes()
    assert len(data) == end

    for size in range(everything[-4][0].offset, end):
        path.write_bytes(data[:size])
        num_whole = sum(position.offset < size for position, _ in everything) - 1
        bounds = [position.offset for position, _ in everything]
        log = DiskLog(tmp_path)

        assert list(log.scan()) == everything[: num_whole + (size in bounds)]
        tail = log.tail()
        assert tail.end is not None
        assert tail.end.offset == max(bound for bound in bounds if bound <= size)


def test_a_flipped_bit_in_the_last_frame_ends_the_log_before_it(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    everything = list(DiskLog(tmp_path).scan())
    path = last_segment(tmp_path)
    data = path.read_bytes()

    for at in range(everything[-1][0].offset, len(data)):
        path.write_bytes(data)
        flip(path, at)

        assert list(DiskLog(tmp_path).scan()) == everything[:-1]


def test_a_flipped_bit_before_the_last_frame_is_damage_named_by_file_and_offset(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    positions = [position.offset for position, _ in DiskLog(tmp_path).scan()]
    path = last_segment(tmp_path)
    data = path.read_bytes()

    for at in range(positions[1], positions[-1], 3):
        path.write_bytes(data)
        flip(path, at)

        with pytest.raises(LogDamaged, match=r"00000001-000000\.seg at byte") as caught:
            list(DiskLog(tmp_path).scan())
        assert caught.value.path == path
        assert caught.value.offset == max(offset for offset in positions if offset <= at)


def test_zeros_behind_the_last_frame_as_a_power_cut_leaves_them_are_the_end(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    everything = frames(tmp_path)
    with last_segment(tmp_path).open("ab") as file:
        file.write(bytes(5000))

    assert frames(tmp_path) == everything


def test_a_torn_frame_whose_payload_holds_frames_of_another_log_is_still_the_end(tmp_path: Path):
    other = open_writer(tmp_path / "other")
    run_jobs(other, range(20))
    other.close()
    payload = last_segment(tmp_path / "other").read_bytes()
    writer = open_writer(tmp_path / "log")
    run_jobs(writer, [1])
    writer.append_jobs([entry(2, payload=payload)])
    writer.close()
    path = last_segment(tmp_path / "log")
    os.truncate(path, path.stat().st_size - 1)

    assert [frame.number for frame in frames(tmp_path / "log") if isinstance(frame, LoggedBatch)] == [1]


def test_damage_in_a_part_that_a_successor_fixed_is_damage_also_at_its_end(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    old = last_segment(tmp_path)
    size = old.stat().st_size
    succeed(tmp_path).close()

    flip(old, size - 1)
    with pytest.raises(LogDamaged):
        frames(tmp_path)
    os.truncate(old, size - 1)
    with pytest.raises(LogDamaged, match=f"at byte {size - 1}: the file ends here"):
        frames(tmp_path)


def test_damage_before_a_position_does_not_hinder_a_scan_from_there(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 15))
    position = writer.append_batch(batch(15, [future(15)]))
    writer.close()
    first = min(tmp_path.glob("*.seg"))
    flip(first, first.stat().st_size - 1)

    with pytest.raises(LogDamaged):
        DiskLog(tmp_path).tail()
    assert DiskLog(tmp_path).tail(position).last == (1, 15)


def test_a_missing_segment_is_damage_unless_it_is_the_oldest(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 20))
    writer.close()
    first, second, third, *_ = sorted(tmp_path.glob("*.seg"))
    everything = list(DiskLog(tmp_path).scan())

    first.unlink()
    assert list(DiskLog(tmp_path).scan()) == [item for item in everything if item[0].segment != first.name]
    third.unlink()
    with pytest.raises(LogDamaged, match=rf"{third.name} at byte 0: this segment is missing"):
        frames(tmp_path)
    second.unlink()
    assert {position.segment for position, _ in DiskLog(tmp_path).scan()}.isdisjoint({second.name, third.name})


@pytest.mark.parametrize("content", [b"", b"\x40\x00\x00\x00\x01", bytes(300)], ids=["empty", "torn", "zeros"])
def test_a_segment_whose_head_was_never_whole_does_not_count(tmp_path: Path, content: bytes):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    everything = frames(tmp_path)
    (tmp_path / "00000002-000000.seg").write_bytes(content)

    assert frames(tmp_path) == everything
    assert DiskLog(tmp_path).tail().epoch == 2
    succeed(tmp_path).close()
    assert frames(tmp_path)[:-1] == everything


def test_a_damaged_head_is_damage_when_frames_follow(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    path = last_segment(tmp_path)
    flip(path, 20)

    with pytest.raises(LogDamaged, match="its head does not read"):
        frames(tmp_path)


def test_what_a_gang_writes_after_its_successor_fixed_the_end_does_not_count(tmp_path: Path):
    zombie = open_writer(tmp_path)
    run_jobs(zombie, range(1, 8))
    before = frames(tmp_path)
    successor = succeed(tmp_path)
    run_jobs(zombie, range(100, 120))
    cut = zombie.append_batch(batch(120, [future(120)]))
    run_jobs(successor, range(8, 10), epoch=2)
    zombie.close()
    successor.close()

    log = frames(tmp_path)

    assert log[: len(before)] == before
    batches = [(frame.epoch, frame.number) for frame in log if isinstance(frame, LoggedBatch)]
    assert batches == [(1, number) for number in range(1, 8)] + [(2, 8), (2, 9)]
    with pytest.raises(UnknownPosition):
        list(DiskLog(tmp_path).scan(cut))


def test_a_gang_whose_successor_is_there_begins_no_segment(tmp_path: Path):
    zombie = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(zombie, [1])
    succeed(tmp_path).close()
    names = set(tmp_path.iterdir())

    with pytest.raises(Fenced, match="belongs to a newer gang than that of epoch 1"):
        run_jobs(zombie, range(2, 20))
    zombie.close()

    assert set(tmp_path.iterdir()) == names


def test_a_gang_that_comes_between_and_writes_late_does_not_count(tmp_path: Path):
    first = open_writer(tmp_path)
    run_jobs(first, [1])
    first.close()
    end = DiskLog(tmp_path).tail().end
    late = open_writer(tmp_path, epoch=2, after=end)
    third = open_writer(tmp_path, epoch=3, after=end)
    run_jobs(late, [2], epoch=2)
    run_jobs(third, [3], epoch=3)
    late.close()
    third.close()

    assert [frame.epoch for frame in frames(tmp_path) if isinstance(frame, LoggedBatch)] == [1, 3]


def test_a_successor_goes_on_behind_a_torn_frame(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2])
    writer.close()
    os.truncate(last_segment(tmp_path), last_segment(tmp_path).stat().st_size - 1)

    successor = succeed(tmp_path)
    run_jobs(successor, [2, 3], epoch=2)
    successor.close()

    assert [(f.epoch, f.number) for f in frames(tmp_path) if isinstance(f, LoggedBatch)] == [(1, 1), (2, 2), (2, 3)]
    assert [f.job.seq for f in frames(tmp_path) if isinstance(f, LoggedJob)] == [1, 2, 3]


def content(log: Path) -> list[Frame]:
    """All frames but the heads."""
    return [frame for frame in frames(log) if not isinstance(frame, SegmentHead)]


def write_until_killed(log: Path, epoch: int, first: int, told: Connection) -> None:
    """A gang's writer that says which batches it has appended."""
    writer = succeed(log, segment_bytes=200_000)
    for number in range(first, first + 1_000_000):
        writer.append_jobs([entry(number, payload=bytes(range(256)) * (number % 200))])
        writer.append_started(number, [future(number)])
        writer.append_batch(batch(number, [future(number)], epoch=epoch))
        told.send(number)


def test_writers_killed_one_after_another_lose_nothing_that_they_had_appended(tmp_path: Path):
    log = tmp_path / "log"
    dice = random.Random(7)
    first = 1
    for epoch in range(1, 16):
        receiver, sender = _FORK.Pipe(duplex=False)
        process = _FORK.Process(target=write_until_killed, args=(log, epoch, first, sender))
        process.start()
        sender.close()
        told = [receiver.recv() for _ in range(dice.randrange(1, 40))]
        process.kill()
        with suppress(EOFError):
            while True:
                told.append(receiver.recv())
        process.join(timeout=120)
        receiver.close()

        batches = [frame.number for frame in frames(log) if isinstance(frame, LoggedBatch)]
        assert batches == list(range(1, len(batches) + 1))
        assert len(batches) >= told[-1]
        tail = DiskLog(log).tail()
        assert tail.epoch == epoch
        assert len(tail.open_jobs) <= 1
        first = len(batches) + 1


def fill_the_disk(log: Path, segment_bytes: int) -> None:
    """Append while files may not grow, then while they may."""

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    writer = open_writer(log, segment_bytes=segment_bytes)
    run_jobs(writer, [1])
    before = content(log)
    for room in (0, 1, 8, 9, 50, 100):
        limit(writer.position().offset + room)
        with pytest.raises(StorageFailure, match="File too large"):
            writer.append_jobs([entry(2, payload=bytes(range(256)) * 3)])
        assert content(log) == before
    limit(40)
    with pytest.raises(StorageFailure):
        writer.append_started(1, [future(2)])
    limit(resource.RLIM_INFINITY)
    run_jobs(writer, [2, 3])
    writer.close()


@pytest.mark.parametrize("segment_bytes", [1_000_000, 300], ids=["in-a-segment", "at-a-rotation"])
def test_a_writer_goes_on_when_a_full_disk_has_room_again(tmp_path: Path, segment_bytes: int):
    process = _FORK.Process(target=fill_the_disk, args=(tmp_path / "log", segment_bytes))
    process.start()
    process.join(timeout=240)

    assert process.exitcode == 0
    log = [frame for frame in frames(tmp_path / "log") if isinstance(frame, LoggedBatch | LoggedJob)]
    assert [f.number if isinstance(f, LoggedBatch) else f.job.seq for f in log] == [1, 1, 2, 2, 3, 3]


def test_a_segment_that_cannot_be_cut_back_is_left_and_the_log_goes_on_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writer = open_writer(tmp_path, clock=ManualClock())
    run_jobs(writer, [1])
    write = os.pwrite

    def write_half(descriptor: int, data: memoryview, at: int) -> int:
        write(descriptor, data[: len(data) // 2], at)
        raise OSError(5, "Input/output error")

    def refuse(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", write_half)
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(Exception, match="cannot append to the job log"):
            writer.append_started(2, [future(2)])
    run_jobs(writer, [2])
    writer.close()

    assert [frame.number for frame in frames(tmp_path) if isinstance(frame, LoggedBatch)] == [1, 2]
    assert [frame.number for frame in frames(tmp_path) if isinstance(frame, Started)] == [1, 2]
    assert len(list(tmp_path.glob("*.seg"))) == 2
