"""What a walk over a log tells."""

import os
from pathlib import Path

import msgspec
import pytest
from tests.support.disklog import batch, future, last_segment, open_writer, run_jobs

from gradstream.shared.clock import ManualClock
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.archive import export_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice
from gradstream.worker.disklog.verify import SegmentState, verify, verify_archive

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_a_sound_log_has_no_problems_and_its_frames_are_counted(tmp_path: Path):
    writer = open_writer(tmp_path)
    run_jobs(writer, [1, 2, 3])
    writer.close()

    report = verify(tmp_path)

    (segment,) = report.segments
    assert report.is_sound
    assert (report.first, report.last, report.num_outcomes) == (BatchId(1, 1), BatchId(1, 3), 3)
    assert segment.state is SegmentState.WHOLE
    assert segment.size_bytes == segment.good_bytes == last_segment(tmp_path).stat().st_size
    assert segment.frames == {"head": 1, "job": 3, "started": 3, "batch": 3}


def test_torn_void_and_empty_segments_are_told_apart_and_are_no_problems(tmp_path: Path):
    zombie = open_writer(tmp_path)
    run_jobs(zombie, [1, 2])
    end = DiskLog(tmp_path).tail().end
    open_writer(tmp_path, epoch=2, after=end).close()
    successor = open_writer(tmp_path, epoch=3, after=end)
    run_jobs(zombie, range(3, 12))
    zombie.close()
    run_jobs(successor, [3], epoch=3)
    successor.close()
    os.truncate(last_segment(tmp_path), last_segment(tmp_path).stat().st_size - 1)
    (tmp_path / "00000004-000000.seg").touch()

    report = verify(tmp_path)

    assert report.is_sound
    assert report.last == BatchId(1, 2)
    assert [segment.state.value for segment in report.segments] == ["torn", "void", "torn", "empty"]


def test_all_damage_is_reported_and_the_rest_is_walked(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 30))
    writer.close()
    paths = sorted(tmp_path.glob("*.seg"))
    for path in (paths[0], paths[2]):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    report = verify(tmp_path)

    assert [problem.split(" at ")[0] for problem in report.problems] == [paths[0].name, paths[2].name]
    assert report.last == BatchId(1, 29)
    damaged = [segment.name for segment in report.segments if segment.state is SegmentState.DAMAGED]
    assert damaged == [paths[0].name, paths[2].name]
    assert report.segments[0].frames["batch"] > 0


def test_a_missing_segment_is_reported(tmp_path: Path):
    writer = open_writer(tmp_path, segment_bytes=1500)
    run_jobs(writer, range(1, 20))
    writer.close()
    second = sorted(tmp_path.glob("*.seg"))[1]
    second.unlink()

    report = verify(tmp_path)

    assert [problem.split(",")[0] for problem in report.problems] == [
        f"{second.name} at byte 0: this segment is missing"
    ]
    assert report.last == BatchId(1, 19)


def test_an_outcome_that_does_not_have_its_digest_is_reported(tmp_path: Path):
    good = batch(1, [future(1)])
    (outcome,) = good.outcomes
    writer = open_writer(tmp_path)
    writer.append_batch(
        msgspec.structs.replace(good, outcomes=[msgspec.structs.replace(outcome, data=outcome.data + b"x")])
    )
    writer.append_batch(batch(2, [future(1)]))
    writer.close()

    assert verify(tmp_path).problems == (
        "batch 1-1: the outcome of s:train:0:1 does not have its digest",
        "batch 1-2: s:train:0:1 had an outcome before",
    )


def test_an_exported_file_is_verified_too(tmp_path: Path):
    writer = open_writer(tmp_path / "log")
    run_jobs(writer, [1, 2])
    writer.close()
    file = tmp_path / "a.gslog"
    export_log(DiskLog(tmp_path / "log"), file, Choice(), clock=ManualClock())

    assert verify_archive(file).is_sound
    assert verify_archive(file).num_outcomes == 2
    os.truncate(file, file.stat().st_size - 1)
    (problem,) = verify_archive(file).problems
    assert problem.startswith("a.gslog at byte ")
