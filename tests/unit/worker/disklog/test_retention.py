"""Which segments leave the disk."""

from pathlib import Path

import pytest
from tests.support.disklog import batch, frames, future, open_writer, run_jobs

from gradstream.shared.clock import ManualClock
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.disklog.frames import Position
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.retention import retain

pytestmark = pytest.mark.usefixtures("no_fsync")

_HOUR_S = 3600.0


def log_of_many_segments(directory: Path, clock: ManualClock) -> list[Path]:
    """Segments that began an hour after one another."""
    writer = open_writer(directory, segment_bytes=1500, clock=clock)
    for number in range(1, 20):
        before = writer.position().segment
        run_jobs(writer, [number])
        if writer.position().segment != before:
            clock.advance(_HOUR_S)
    writer.close()
    return sorted(directory.glob("*.seg"))


def test_nothing_leaves_while_the_log_is_small_and_young(tmp_path: Path):
    clock = ManualClock()
    paths = log_of_many_segments(tmp_path, clock)

    removed = retain(
        tmp_path, before=Position(paths[-1].name, 0), max_bytes=10**9, max_age_s=100 * _HOUR_S, clock=clock
    )

    assert removed == []


def test_the_oldest_segments_leave_until_the_rest_is_small_enough(tmp_path: Path):
    clock = ManualClock()
    paths = log_of_many_segments(tmp_path, clock)
    everything = list(DiskLog(tmp_path).scan())
    rest_bytes = sum(path.stat().st_size for path in paths[2:])

    removed = retain(
        tmp_path, before=Position(paths[-1].name, 0), max_bytes=rest_bytes, max_age_s=1000 * _HOUR_S, clock=clock
    )

    assert removed == [path.name for path in paths[:2]]
    assert list(DiskLog(tmp_path).scan()) == [item for item in everything if item[0].segment not in removed]


def test_segments_that_ended_too_long_ago_leave(tmp_path: Path):
    clock = ManualClock()
    paths = log_of_many_segments(tmp_path, clock)
    started_ms = [next(frame.created_ms for frame in frames(tmp_path) if frame.__class__.__name__ == "SegmentHead")]
    age_s = (clock.wall_ms() - started_ms[0]) / 1000 - 2.5 * _HOUR_S

    removed = retain(tmp_path, before=Position(paths[-1].name, 0), max_bytes=10**9, max_age_s=age_s, clock=clock)

    assert removed == [path.name for path in paths[: len(removed)]]
    assert 0 < len(removed) <= 3


def test_what_a_snapshot_needs_stays_whatever_it_takes(tmp_path: Path):
    clock = ManualClock()
    paths = log_of_many_segments(tmp_path, clock)

    removed = retain(tmp_path, before=Position(paths[1].name, 900), max_bytes=0, max_age_s=0, clock=clock)

    assert removed == [paths[0].name]


def test_segments_that_do_not_count_leave_with_their_neighbours(tmp_path: Path):
    open_writer(tmp_path).close()
    end = DiskLog(tmp_path).tail().end
    open_writer(tmp_path, epoch=2, after=end).close()
    successor = open_writer(tmp_path, epoch=3, after=end)
    position = successor.append_batch(batch(1, [future(99)], epoch=3))
    successor.close()

    retain(tmp_path, before=position, max_bytes=0, max_age_s=0, clock=ManualClock())

    assert [path.name for path in tmp_path.glob("*.seg")] == [position.segment]
    assert len(frames(tmp_path)) == 2


def test_an_unknown_position_removes_nothing(tmp_path: Path):
    clock = ManualClock()
    paths = log_of_many_segments(tmp_path, clock)

    with pytest.raises(UnknownPosition):
        retain(tmp_path, before=Position("00000009-000000.seg", 0), max_bytes=0, max_age_s=0, clock=clock)
    assert sorted(tmp_path.glob("*.seg")) == paths
