"""Somebody deletes the key that keeps the last ids of the streams."""

import pytest
from tests.support.joblog_bench import Bench

from gradstream.shared.joblog.port import BatchId, FutureStatus
from gradstream.shared.wire import OptimStepDone

_DONE = OptimStepDone(metrics={})


@pytest.fixture
async def emptied(bench: Bench) -> Bench:
    """A log of two jobs and one batch, then without `stat`."""
    await bench.create()
    await bench.submit(1)
    bench.commit(bench.log(), _DONE)
    assert bench.raw.delete(bench.keys.stat) == 1
    return bench


async def test_a_job_that_is_accepted_then_comes_behind_those_of_the_log(emptied: Bench) -> None:
    await emptied.submit(2)
    assert [entry.entry_id for entry in emptied.log()] == ["1-0", "2-0", "3-0"]


async def test_the_next_batch_is_committed_and_its_waiters_are_told(emptied: Bench) -> None:
    await emptied.submit(2)
    num_notes = emptied.raw.xlen(emptied.keys.notes)
    emptied.commit(emptied.log()[2:], _DONE, number=2)
    assert (await emptied.view(2)).status is FutureStatus.DONE
    assert emptied.raw.xlen(emptied.keys.notes) == num_notes + 1
    assert emptied.feed.last_batch() == BatchId(emptied.epoch, 2)


async def test_a_batch_that_is_not_above_the_last_one_is_refused_all_the_same(emptied: Bench) -> None:
    await emptied.submit(2)
    with pytest.raises(ValueError, match="does not come after"):
        emptied.commit(emptied.log()[2:], _DONE, number=1)


async def test_a_gang_that_takes_over_finds_the_last_batch(emptied: Bench) -> None:
    emptied.feed.acquire(owner="test-gang")
    assert emptied.feed.last_batch() == BatchId(emptied.epoch, 1)
