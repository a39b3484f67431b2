"""The log of a gang that takes no snapshots stays within its bounds."""

from pathlib import Path
from typing import cast

import pytest
from tests.support.disklog import entry, open_writer, run_jobs

from gradstream.shared.clock import ManualClock
from gradstream.shared.joblog.port import Commit, Feed
from gradstream.worker.commit import Committer
from gradstream.worker.disklog.segments import segment_paths
from gradstream.worker.journal import Journal
from gradstream.worker.keeping import Durability
from gradstream.worker.trimming import Trimmer

_SEGMENT_BYTES = 1500


class Redis:
    """Takes every commit."""

    def commit(self, commit: Commit) -> None:
        del commit


@pytest.fixture
def committer():
    committer = Committer(cast("Feed", Redis()), log=lambda _: None)
    committer.start()
    yield committer
    committer.close()


def trimmer(directory: Path, journal: Journal, committer: Committer, *, max_bytes: int) -> Trimmer:
    durability = Durability(
        engine="main", joblog=directory, snapshots=directory / "none", mode="none", retention_bytes=max_bytes
    )
    return Trimmer(journal, committer, durability=durability, clock=ManualClock())


def names(directory: Path) -> list[str]:
    return [path.name for path in segment_paths(directory)]


def test_segments_of_ended_jobs_leave_when_the_log_is_too_long(tmp_path, committer):
    writer = open_writer(tmp_path, segment_bytes=_SEGMENT_BYTES)
    run_jobs(writer, range(1, 30))
    before = names(tmp_path)
    removed = trimmer(tmp_path, Journal(writer, open_jobs={}), committer, max_bytes=1).trim()
    assert removed == before[:-1]
    assert names(tmp_path) == before[-1:]
    writer.close()


def test_nothing_from_the_oldest_open_job_on_leaves(tmp_path, committer):
    writer = open_writer(tmp_path, segment_bytes=_SEGMENT_BYTES)
    run_jobs(writer, range(1, 10))
    journal = Journal(writer, open_jobs={})
    oldest_open = writer.position().segment
    journal.log_read([entry(99)])
    run_jobs(writer, range(10, 30))
    trimmer(tmp_path, journal, committer, max_bytes=1).trim()
    assert names(tmp_path)[0] == oldest_open
    writer.close()


def test_a_log_within_its_bounds_is_left_alone(tmp_path, committer):
    writer = open_writer(tmp_path, segment_bytes=_SEGMENT_BYTES)
    run_jobs(writer, range(1, 30))
    assert trimmer(tmp_path, Journal(writer, open_jobs={}), committer, max_bytes=10**9).trim() == []
    writer.close()


def test_nothing_leaves_when_commits_no_longer_reach_redis(tmp_path):
    """What was logged and not committed is what a successor makes up for."""
    committer = Committer(cast("Feed", Redis()), log=lambda _: None)
    commit = Commit(epoch=1, number=7, outcomes=[], plan=b"", cursor="0-0", at_ms=1)
    committer.put(commit, on_tick=lambda: None)
    writer = open_writer(tmp_path, segment_bytes=_SEGMENT_BYTES)
    run_jobs(writer, range(1, 30))
    # Never started, so the commit stays queued; closing it ends the wait.
    committer._closing = True
    assert trimmer(tmp_path, Journal(writer, open_jobs={}), committer, max_bytes=1).trim() == []
    writer.close()
