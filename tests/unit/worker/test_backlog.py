"""Jobs between reading and commit, and where reading must start again."""

import random

from hypothesis import given
from hypothesis import strategies as st
from tests.support.worker_jobs import entry, job

from gradstream.worker.backlog import Backlog
from gradstream.worker.plan import Limits, next_turn

LIMITS = Limits(batch_tokens=1, batch_jobs=1, row_budget_tokens=1)


def take_one(backlog: Backlog) -> list:
    turn = next_turn(backlog.waiting, limits=LIMITS, lanes=backlog.lanes)
    assert turn is not None
    return backlog.take(turn)


def test_a_served_owner_goes_to_the_end_of_the_turn():
    backlog = Backlog(cursor="0-0")
    for number, (owner, seq) in enumerate([("a", 1), ("a", 2), ("b", 1)], start=1):
        backlog.add(entry(number, job(owner, seq, "optim_step")))
    assert [take_one(backlog)[0].future_id for _ in range(3)] == ["a:1", "b:1", "a:2"]


def test_closed_entries_are_skipped_and_moved_over():
    backlog = Backlog(cursor="0-0")
    backlog.add(entry(1, job("a", 1, "optim_step"), is_open=False))
    backlog.add(entry(2, job("a", 2, "optim_step")))
    backlog.add(entry(3, job("a", 3, "optim_step"), is_open=False))
    jobs = take_one(backlog)
    assert [one.future_id for one in jobs] == ["a:2"]
    assert backlog.settle(jobs) == "3-0"


def test_the_cursor_stays_before_a_job_that_is_running():
    backlog = Backlog(cursor="4-0")
    for number in (5, 6, 7):
        backlog.add(entry(number, job(f"m{number}", 1, "optim_step")))
    first, second, third = take_one(backlog), take_one(backlog), take_one(backlog)
    assert backlog.settle(second) == "4-0"
    assert backlog.settle(first) == "6-0"
    assert backlog.settle(third) == "7-0"


def test_a_started_job_is_suspect_until_it_is_settled():
    backlog = Backlog(cursor="0-0")
    backlog.add(entry(1, job("s", 1, "sample"), starts=1))
    assert backlog.starts == {"s:1": 1}
    backlog.settle(take_one(backlog))
    assert backlog.starts == {}


@given(num_entries=st.integers(1, 30), seed=st.integers(0, 1000))
def test_reading_from_the_cursor_sees_every_open_job_and_nothing_before_the_oldest(num_entries, seed):
    backlog = Backlog(cursor="0-0")
    for number in range(1, num_entries + 1):
        backlog.add(entry(number, job(f"m{number}", 1, "optim_step")))
    jobs = [take_one(backlog) for _ in range(num_entries)]
    random.Random(seed).shuffle(jobs)
    open_numbers = set(range(1, num_entries + 1))
    for taken in jobs:
        cursor = int(backlog.settle(taken).split("-")[0])
        open_numbers.remove(int(taken[0].owner[1:]))
        assert cursor == (min(open_numbers) - 1 if open_numbers else num_entries)
