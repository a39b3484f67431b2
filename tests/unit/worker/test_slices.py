"""Samples run in slices between batches of training."""

from collections import defaultdict
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.support.worker_jobs import entry, job

from gradstream.shared.wire import Job
from gradstream.worker.backlog import Backlog
from gradstream.worker.fairness import Lane, lane_of
from gradstream.worker.lanes import Lanes
from gradstream.worker.plan import Limits, Turn, next_turn

LIMITS = Limits(batch_tokens=100, batch_jobs=8, row_budget_tokens=50, running_jobs=3, running_tokens=100)


def backlog_of(*jobs: Job, starts: int = 0) -> Backlog:
    backlog = Backlog(cursor="0-0")
    for number, one in enumerate(jobs, start=1):
        backlog.add(entry(number, one, starts=starts))
    return backlog


def turn_of(backlog: Backlog, limits: Limits = LIMITS) -> Turn | None:
    return next_turn(
        backlog.waiting,
        limits=limits,
        lanes=backlog.lanes,
        fairness=backlog.fairness,
        suspects=backlog.starts.keys(),
        running=backlog.running.values(),
    )


def taken(backlog: Backlog, limits: Limits = LIMITS) -> list[str]:
    turn = turn_of(backlog, limits)
    assert turn is not None
    return [one.future_id for one in backlog.take(turn)]


def sample(owner: str, seq: int = 1, *, num_tokens: int = 10, tenant: str = "local") -> Job:
    return job(owner, seq, "sample", num_tokens=num_tokens, tenant=tenant)


def test_a_running_sample_and_waiting_training_alternate_one_slice_to_one_batch():
    backlog = backlog_of(sample("s"), *(job("m", seq, "optim_step") for seq in (1, 2)))
    lanes = []
    for _ in range(4):
        turn = turn_of(backlog)
        lanes.append((turn.lane, turn.plan.future_ids))
        done = [one for one in backlog.take(turn) if one.op != "sample"]
        backlog.settle(done)
    assert lanes == [
        (Lane.SAMPLE, ["s:1"]),
        (Lane.TRAIN, ["m:1"]),
        (Lane.SAMPLE, []),
        (Lane.TRAIN, ["m:2"]),
    ]


def test_a_new_sample_joins_those_that_run():
    backlog = backlog_of(sample("a"))
    assert taken(backlog) == ["a:1"]
    backlog.add(entry(2, sample("b")))
    assert taken(backlog) == ["b:1"]
    assert list(backlog.running) == ["a:1", "b:1"]


def test_a_slice_is_short_when_samples_join_and_no_training_waits_for_its_end():
    backlog = backlog_of(sample("a"))
    assert turn_of(backlog).plan.num_steps == LIMITS.joining_slice_steps
    backlog.take(turn_of(backlog))
    assert turn_of(backlog).plan.num_steps == LIMITS.slice_steps
    backlog.add(entry(2, sample("b")))
    assert turn_of(backlog).plan.num_steps == LIMITS.joining_slice_steps
    backlog.add(entry(3, job("m", 1, "optim_step")))
    backlog.lanes = Lanes(last=Lane.TRAIN)
    assert turn_of(backlog).plan.num_steps == LIMITS.slice_steps


def test_training_batches_have_no_steps():
    backlog = backlog_of(sample("a"), job("m", 1, "optim_step"))
    backlog.take(turn_of(backlog))
    assert turn_of(backlog).plan.num_steps == 0


def test_samples_beyond_the_bounds_wait_until_one_ends():
    backlog = backlog_of(*(sample("a", seq) for seq in range(1, 6)))
    assert taken(backlog) == ["a:1", "a:2", "a:3"]
    assert taken(backlog) == []
    backlog.settle([backlog.running["a:2"]])
    assert taken(backlog) == ["a:4"]


def test_a_large_sample_in_turn_is_not_overtaken_by_small_ones_for_ever():
    backlog = backlog_of(sample("a", num_tokens=40))
    taken(backlog)
    backlog.add(entry(2, sample("big", num_tokens=80)))
    backlog.add(entry(3, sample("c", num_tokens=10)))
    assert taken(backlog) == []
    backlog.settle(list(backlog.running.values()))
    assert taken(backlog) == ["big:1", "c:1"]


def test_small_samples_of_others_go_before_a_large_one_without_room_only_until_they_were_served_as_much():
    limits = replace(LIMITS, batch_tokens=4000, running_tokens=4000, running_jobs=64)
    backlog = backlog_of(sample("a", num_tokens=3000))
    taken(backlog, limits)
    backlog.add(entry(2, sample("big", num_tokens=2000)))
    joined = []
    for number in range(3, 103):
        backlog.add(entry(number, sample(f"new{number}", num_tokens=200)))
        joined += (now := taken(backlog, limits))
        # The sample that keeps the large one out still runs.
        backlog.settle([backlog.running[one] for one in now])
    assert 0 < len(joined) <= 2 * 2000 / 200


def test_strict_isolation_lets_no_other_owner_join():
    strict = replace(LIMITS, is_strict=True)
    backlog = backlog_of(sample("a", 1), sample("b", 1))
    assert taken(backlog, strict) == ["a:1"]
    assert taken(backlog, strict) == []
    backlog.settle(list(backlog.running.values()))
    assert taken(backlog, strict) == ["b:1"]


def test_a_suspected_sample_starts_when_no_other_runs_and_nothing_else_runs_before_it_has_ended():
    backlog = backlog_of(sample("a"))
    taken(backlog)
    backlog.add(entry(2, sample("s"), starts=1))
    assert taken(backlog) == []
    backlog.settle(list(backlog.running.values()))
    assert taken(backlog) == ["s:1"]
    backlog.add(entry(3, job("m", 1, "optim_step")))
    backlog.add(entry(4, sample("b")))
    for _ in range(3):
        turn = turn_of(backlog)
        assert (turn.lane, turn.plan.future_ids) == (Lane.SAMPLE, [])
        backlog.take(turn)
    backlog.settle(list(backlog.running.values()))
    assert taken(backlog) == ["m:1"]
    assert taken(backlog) == ["b:1"]


def test_the_cursor_stays_before_a_running_sample_while_later_jobs_are_settled():
    backlog = backlog_of(sample("s"), job("m", 1, "optim_step"), job("m", 2, "optim_step"))
    taken(backlog)
    for _ in range(2):
        turn = turn_of(backlog)
        done = [one for one in backlog.take(turn) if one.op != "sample"]
        assert backlog.settle(done) == "0-0"
        backlog.take(turn_of(backlog))
    assert list(backlog.running) == ["s:1"]
    assert backlog.settle(list(backlog.running.values())) == "3-0"


OPS = st.sampled_from(["forward_backward", "optim_step", "save_weights", "sample", "sample"])
# Tenant, owner, op, tokens, slices that it takes if it is a sample, whether an earlier gang had started it.
SENT = st.tuples(
    st.sampled_from("abc"), st.integers(0, 2), OPS, st.integers(0, 120), st.integers(1, 5), st.integers(0, 1)
)
ANY_LIMITS = st.builds(
    Limits,
    batch_tokens=st.integers(1, 200),
    batch_jobs=st.integers(1, 10),
    row_budget_tokens=st.just(64),
    is_strict=st.booleans(),
    running_jobs=st.integers(1, 6),
    running_tokens=st.integers(1, 300),
)


@given(log=st.lists(SENT, max_size=50), limits=ANY_LIMITS)
def test_nothing_is_lost_lanes_alternate_and_bounds_hold_whatever_is_sent(log, limits):
    counts: dict[str, int] = defaultdict(int)
    arriving, slices, is_suspect = [], {}, set()
    for number, (tenant, who, op, num_tokens, num_slices, starts) in enumerate(log, start=1):
        owner = f"{tenant}{'s' if op == 'sample' else 'm'}{who}"
        counts[owner] += 1
        one = job(owner, counts[owner], op, num_tokens=num_tokens, tenant=tenant)
        slices[one.future_id] = num_slices
        num_starts = starts if op == "sample" else 0
        if num_starts:
            is_suspect.add(one.future_id)
        arriving.append(entry(number, one, starts=num_starts))
    half = len(arriving) // 2
    backlog = Backlog(cursor="0-0")
    for first in arriving[:half]:
        backlog.add(first)
    late = iter(arriving[half:])
    ended: list[str] = []
    for _ in range(10 * len(log) + 10):
        if (one := next(late, None)) is not None:
            backlog.add(one)
        turn = turn_of(backlog, limits)
        if turn is None:
            break
        ran_before = set(backlog.running)
        trains = any(lane_of(queue[0].op) is Lane.TRAIN for queue in backlog.waiting.values())
        samples = bool(ran_before) or any(lane_of(queue[0].op) is Lane.SAMPLE for queue in backlog.waiting.values())
        if trains and samples and not ran_before & is_suspect:
            assert turn.lane is not backlog.lanes.last
        jobs = backlog.take(turn)
        if turn.lane is Lane.TRAIN:
            assert jobs
            assert turn.plan.num_steps == 0
            done = jobs
        else:
            assert turn.plan.num_steps > 0
            running = backlog.running
            assert len(running) <= max(limits.running_jobs, 1)
            cost = sum(max(one.num_tokens, 1) for one in running.values())
            assert len(running) == 1 or cost <= limits.running_tokens or not ran_before
            assert len(running) == 1 or not is_suspect & set(running)
            assert not limits.is_strict or len({one.owner for one in running.values()}) == 1
            for future_id in running:
                slices[future_id] -= 1
            done = [one for future_id, one in running.items() if slices[future_id] <= 0]
        backlog.settle(done)
        ended += [one.future_id for one in done]
    assert sorted(ended) == sorted(one.job.future_id for one in arriving)
    assert len(backlog) == 0
    assert not backlog.running


def test_a_new_sample_begins_after_one_batch_of_training_although_sampling_had_more_time():
    backlog = backlog_of(sample("s"), *(job("m", seq, "optim_step") for seq in (1, 2, 3)))
    assert taken(backlog) == ["s:1"]
    backlog.lanes.ran(0.5)
    for future_id in ("m:1", "m:2"):
        assert taken(backlog) == [future_id]
        backlog.settle([backlog.running[future_id]])
        backlog.lanes.ran(0.1)
    backlog.add(entry(9, sample("t")))
    assert taken(backlog) == ["t:1"]
