"""Tenants are served alike: what one of them sends delays another by a bounded amount of work."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.worker_jobs import entry, job

from gradstream.shared.wire import Job
from gradstream.worker.backlog import Backlog
from gradstream.worker.fairness import JOB_TOKENS, Fairness, Lane, cost, lane_of
from gradstream.worker.plan import Limits, Turn, next_turn

LIMITS = Limits(batch_tokens=100, batch_jobs=8, row_budget_tokens=50)
NARROW = Limits(batch_tokens=1, batch_jobs=1, row_budget_tokens=50)


def backlog_of(*jobs: Job) -> Backlog:
    backlog = Backlog(cursor="0-0")
    for number, one in enumerate(jobs, start=1):
        backlog.add(entry(number, one))
    return backlog


def turn_of(backlog: Backlog, limits: Limits = LIMITS) -> Turn | None:
    return next_turn(backlog.waiting, limits=limits, lanes=backlog.lanes, fairness=backlog.fairness)


def flood(
    tenant: str, *, num_models: int, op: str = "forward_backward", num_jobs: int = 3, num_tokens: int = 10
) -> list[Job]:
    return [
        job(f"{tenant}{model}", seq, op, num_tokens=num_tokens, tenant=tenant)
        for seq in range(1, num_jobs + 1)
        for model in range(num_models)
    ]


def leads(backlog: Backlog, count: int, limits: Limits = NARROW) -> list[str]:
    tenants = []
    for _ in range(count):
        turn = turn_of(backlog, limits)
        assert turn is not None
        jobs = backlog.take(turn)
        backlog.settle(jobs)
        tenants.append(jobs[0].tenant)
    return tenants


def test_two_hundred_models_get_their_tenant_no_more_turns_than_one_model_does():
    backlog = backlog_of(*flood("heavy", num_models=200), *flood("light", num_models=1))
    assert leads(backlog, 6) == ["heavy", "light"] * 3


def test_of_two_tenants_that_wait_each_is_served_as_many_tokens():
    jobs = [
        *flood("a", num_models=1, num_tokens=1000, num_jobs=8),
        *flood("b", num_models=1, num_tokens=250, num_jobs=32),
    ]
    served = Counter(leads(backlog_of(*jobs), 25))
    assert served == {"a": 5, "b": 20}


def test_of_a_tenants_models_each_is_served_as_many_tokens():
    jobs = [job("a", seq, "forward_backward", num_tokens=1000) for seq in range(1, 9)]
    jobs += [job("b", seq, "forward_backward", num_tokens=250) for seq in range(1, 33)]
    backlog = backlog_of(*jobs)
    served = Counter[str]()
    for _ in range(25):
        served.update(one.owner for one in backlog.take(turn_of(backlog, NARROW)))
    assert served == {"a": 5, "b": 20}


def test_a_batch_is_shared_by_tenants_before_it_is_shared_by_models():
    backlog = backlog_of(*flood("heavy", num_models=20), *flood("light", num_models=4))
    turn = turn_of(backlog)
    assert turn is not None
    tenants = [one.tenant for one in backlog.take(turn)]
    assert tenants.count("heavy") == tenants.count("light") == 4


def test_who_idled_has_saved_up_nothing():
    backlog = backlog_of(*flood("a", num_models=1, num_jobs=40))
    leads(backlog, 20)
    for number, one in enumerate(flood("b", num_models=1, num_jobs=20), start=100):
        backlog.add(entry(number, one))
    assert Counter(leads(backlog, 10)) == {"a": 5, "b": 5}


def test_what_one_was_served_while_nobody_else_waited_is_not_held_against_it():
    backlog = backlog_of(*flood("a", num_models=1, num_jobs=100, num_tokens=5000))
    leads(backlog, 50)
    for number, one in enumerate(flood("b", num_models=1, num_jobs=20, num_tokens=5000), start=1000):
        backlog.add(entry(number, one))
    assert leads(backlog, 6) == ["a", "b"] * 3


def test_what_one_got_beside_smaller_jobs_of_others_is_held_against_it_for_no_more_than_a_budget():
    limits = Limits(batch_tokens=1000, batch_jobs=8, row_budget_tokens=50)
    fairness = Fairness()
    for number in range(1, 50):
        large, small = (
            job(f"a{number}", number, "forward_backward", num_tokens=512, tenant="a"),
            job(f"b{number}", number, "forward_backward", tenant="b"),
        )
        for one in (large, small):
            fairness.wait(one)
        fairness.serve([large, small], budget_tokens=limits.batch_tokens)
        for one in (large, small):
            fairness.leave(one)
    shares = fairness.tenants[Lane.TRAIN]
    assert shares.tag("a") - shares.now == limits.batch_tokens
    assert shares.tag("b") == shares.now


STEP = [(1, "forward_backward", 10), (2, "optim_step", 0)]


def test_models_that_come_late_get_into_step_with_the_others():
    early = [job(f"a{number}", seq, op, num_tokens=size) for number in range(3) for seq, op, size in STEP]
    backlog = backlog_of(*early)
    assert [one.seq for one in backlog.take(turn_of(backlog))] == [1, 1, 1]
    late = [job(f"b{number}", seq, op, num_tokens=size) for number in range(3) for seq, op, size in STEP]
    for number, one in enumerate(late, start=100):
        backlog.add(entry(number, one))
    assert {one.owner for one in backlog.take(turn_of(backlog))} == {"b0", "b1", "b2"}
    assert len(backlog.take(turn_of(backlog))) == 6


def test_a_tenant_that_samples_keeps_its_turn_in_training():
    jobs = flood("a", num_models=1) + flood("a", num_models=1, op="sample")
    jobs = [job(f"{one.owner}{one.op}", one.seq, one.op, num_tokens=10, tenant="a") for one in jobs]
    backlog = backlog_of(*jobs, *flood("b", num_models=1))
    lanes = defaultdict(list)
    while (turn := turn_of(backlog, NARROW)) is not None:
        jobs = backlog.take(turn)
        lanes[turn.lane].append(jobs[0].tenant)
        backlog.settle(jobs)
    assert lanes[Lane.TRAIN] == ["a", "b", "a", "b", "a", "b"]


def test_a_stream_of_new_owners_with_small_jobs_does_not_keep_a_large_job_waiting():
    backlog = backlog_of(job("large", 1, "forward_backward", num_tokens=2000))
    for number in range(100, 200):
        backlog.add(entry(number, job(f"new{number}", 1, "forward_backward")))
        jobs = backlog.take(turn_of(backlog, NARROW))
        if jobs[0].owner == "large":
            break
    assert number - 100 <= 2 * 2000 / JOB_TOKENS


OPS = st.sampled_from(["forward_backward", "forward", "optim_step", "save_weights", "sample"])
# Tenant, model, op, tokens.
SENT = st.tuples(st.sampled_from("abc"), st.integers(0, 3), OPS, st.sampled_from([0, 100, 130, 500, 2000]))
ANY_LIMITS = st.builds(
    Limits,
    batch_tokens=st.integers(1, 4000),
    batch_jobs=st.integers(1, 10),
    row_budget_tokens=st.just(64),
    is_strict=st.booleans(),
)


def sent(log: list[tuple[str, int, str, int]]) -> list[Job]:
    counts: dict[str, int] = defaultdict(int)
    jobs = []
    for tenant, model, op, num_tokens in log:
        owner = f"{tenant}{'s' if op == 'sample' else 'm'}{model}"
        counts[owner] += 1
        jobs.append(job(owner, counts[owner], op, num_tokens=num_tokens, tenant=tenant))
    return jobs


@pytest.mark.parametrize("key", [lambda one: one.tenant, lambda one: one.owner], ids=["tenants", "owners"])
@given(log=st.lists(SENT, max_size=60), late=st.lists(SENT, max_size=60), limits=ANY_LIMITS)
def test_nobody_waits_for_more_than_a_bounded_cost_of_others(key: Callable[[Job], Hashable], log, late, limits):
    """The bound that the module `plan` states: of tenants, and of owners where all are of one tenant."""
    jobs = sent(log + late)
    if key(job("a", 1, "forward")) == "a":
        jobs = [job(one.owner, one.seq, one.op, num_tokens=one.num_tokens) for one in jobs]
    backlog, arriving = backlog_of(*jobs[: len(log)]), iter(enumerate(jobs[len(log) :], start=len(log) + 1))
    waited: dict[tuple[Lane, Hashable], list[int]] = defaultdict(list)
    done: list[Job] = []
    turns: list[int] = []
    while (turn := turn_of(backlog, limits)) is not None:
        waiting = {key(queue[0]) for queue in backlog.waiting.values() if lane_of(queue[0].op) == turn.lane}
        batch = backlog.take(turn)
        backlog.settle(batch)
        turns.append(sum(map(cost, batch)))
        served = {key(one) for one in batch}
        waited = defaultdict(
            list, {at: costs for at, costs in waited.items() if at[0] != turn.lane or at[1] in waiting}
        )
        for one in waiting:
            waited[turn.lane, one] = [] if one in served else [*waited[turn.lane, one], turns[-1]]
        done += batch
        largest_batch = max(*turns, limits.batch_tokens, 0)
        largest_job = max(map(cost, jobs))
        most = len({key(one) for one in jobs}) * (largest_job + 2 * largest_batch)
        assert all(sum(costs) <= most for costs in waited.values())
        if (arrival := next(arriving, None)) is not None:
            backlog.add(entry(arrival[0], arrival[1]))
    assert len(done) == len(jobs) - sum(1 for _ in arriving)


@pytest.mark.parametrize("op", ["forward_backward", "delete_checkpoint", "sample"])
def test_jobs_of_two_tenants_in_one_owners_queue_are_all_served_in_order(op: str) -> None:
    jobs = [
        job("m", 1, "forward_backward", num_tokens=10, tenant="a"),
        job("m", 2, op, num_tokens=10, tenant="b"),
        job("m", 3, "forward_backward", num_tokens=10, tenant="a"),
    ]
    backlog = backlog_of(*jobs)
    served: list[Job] = []
    while (turn := turn_of(backlog)) is not None and turn.plan.future_ids:
        taken = backlog.take(turn)
        backlog.settle(taken)
        served += taken
    assert served == jobs
    assert not any(backlog.fairness.tenants[lane].num_waiting for lane in Lane)
