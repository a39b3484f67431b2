"""A batch that had no room leaves its mark in the log, and the first of the batches after it is marked with the same number."""

from pathlib import Path

from tests.support.disklog import batch, entry, future, open_writer

from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.inspect.log_rows import Wanted, jobs_in
from gradstream.worker.recovery.past import read

FIRST, SECOND, THIRD = future(1), future(2), future(3)


def split(directory: Path) -> DiskLog:
    """The log of a gang that ran three jobs one by one after they had no room together, and died in the second."""
    writer = open_writer(directory)
    writer.append_jobs([entry(number) for number in (1, 2, 3)])
    writer.append_started(1, [FIRST, SECOND, THIRD])
    writer.append_started(1, [FIRST])
    writer.append_batch(batch(1, [FIRST]))
    writer.append_started(2, [SECOND])
    writer.close()
    return DiskLog(directory)


def test_a_take_over_reads_one_batch_of_the_number_and_counts_each_open_job_started_once(tmp_path: Path) -> None:
    past = read(split(tmp_path), None, keep=lambda _: True)

    assert past.ids == [BatchId(1, 1)]
    assert [[ended.job.future_id for ended in one.ended] for one in past.batches] == [[FIRST]]
    assert list(past.open_jobs) == [SECOND, THIRD]
    assert past.starts == {SECOND: {1}, THIRD: {1}}


def test_the_end_of_the_log_counts_each_open_job_started_once(tmp_path: Path) -> None:
    tail = split(tmp_path).tail()

    assert tail.last == BatchId(1, 1)
    assert tail.starts == {SECOND: {1}, THIRD: {1}}


def test_the_list_of_jobs_names_the_epoch_of_each_once(tmp_path: Path) -> None:
    frames = [frame for _, frame in split(tmp_path).scan()]

    rows = [ended.row() for ended in jobs_in(frames, Wanted())]

    assert [(row.future_id, row.epochs) for row in rows] == [(FIRST, [1]), (SECOND, [1]), (THIRD, [1])]
