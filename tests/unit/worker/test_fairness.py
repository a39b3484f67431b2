"""Tenants take turns: what one of them sends delays another by a bounded number of batches."""

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st
from tests.support.worker_jobs import entry, job

from gradstream.shared.wire import Job
from gradstream.worker.backlog import Backlog
from gradstream.worker.plan import Lane, Limits, Turn, lane_of, next_turn

LIMITS = Limits(batch_tokens=100, batch_jobs=8, row_budget_tokens=50)
NARROW = Limits(batch_tokens=1, batch_jobs=1, row_budget_tokens=50)


def backlog_of(*jobs: Job) -> Backlog:
    backlog = Backlog(cursor="0-0")
    for number, one in enumerate(jobs, start=1):
        backlog.add(entry(number, one))
    return backlog


def turn_of(backlog: Backlog, limits: Limits = LIMITS) -> Turn | None:
    return next_turn(backlog.waiting, limits=limits, last_lane=backlog.last_lane, last_led=backlog.last_led)


def flood(tenant: str, *, num_models: int, op: str = "forward_backward", num_jobs: int = 3) -> list[Job]:
    return [
        job(f"{tenant}{model}", seq, op, num_tokens=10, tenant=tenant)
        for seq in range(1, num_jobs + 1)
        for model in range(num_models)
    ]


def leads(backlog: Backlog, count: int, limits: Limits = NARROW) -> list[str]:
    tenants = []
    for _ in range(count):
        turn = turn_of(backlog, limits)
        assert turn is not None
        backlog.settle(backlog.take(turn))
        tenants.append(turn.tenant)
    return tenants


def test_two_hundred_models_get_their_tenant_no_more_turns_than_one_model_does():
    backlog = backlog_of(*flood("heavy", num_models=200), *flood("light", num_models=1))
    assert leads(backlog, 6) == ["heavy", "light"] * 3


def test_a_batch_is_shared_by_tenants_before_it_is_shared_by_models():
    backlog = backlog_of(*flood("heavy", num_models=20), *flood("light", num_models=1, num_jobs=9))
    turn = turn_of(backlog)
    assert turn is not None
    tenants = [one.tenant for one in backlog.take(turn)]
    assert tenants.count("heavy") == tenants.count("light") == 4


def test_riding_along_in_another_tenants_batch_costs_no_turn():
    jobs = [job("a1", 1, "forward_backward", num_tokens=90, tenant="a")]
    jobs += [job("b1", seq, "optim_step", tenant="b") for seq in (1, 2)]
    jobs += [job("a2", seq, "optim_step", tenant="a") for seq in (1, 2)]
    assert leads(backlog_of(*jobs), 3, LIMITS) == ["a", "b", "a"]


def test_a_tenant_that_samples_keeps_its_turn_in_training():
    jobs = flood("a", num_models=1) + flood("a", num_models=1, op="sample")
    jobs = [job(f"{one.owner}{one.op}", one.seq, one.op, num_tokens=10, tenant="a") for one in jobs]
    backlog = backlog_of(*jobs, *flood("b", num_models=1))
    lanes = defaultdict(list)
    while (turn := turn_of(backlog, NARROW)) is not None:
        lanes[turn.lane].append(turn.tenant)
        backlog.settle(backlog.take(turn))
    assert lanes[Lane.TRAIN] == ["a", "b", "a", "b", "a", "b"]


OPS = st.sampled_from(["forward_backward", "forward", "optim_step", "save_weights", "sample"])
# Tenant, model, op, tokens.
SENT = st.tuples(st.sampled_from("abc"), st.integers(0, 3), OPS, st.integers(0, 120))
ANY_LIMITS = st.builds(
    Limits,
    batch_tokens=st.integers(1, 200),
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


@given(log=st.lists(SENT, max_size=60), late=st.lists(SENT, max_size=60), limits=ANY_LIMITS)
def test_a_waiting_tenant_leads_within_as_many_batches_of_its_lane_as_there_are_tenants(log, late, limits):
    jobs = sent(log + late)
    backlog, arriving = backlog_of(*jobs[: len(log)]), iter(enumerate(jobs[len(log) :], start=len(log) + 1))
    num_tenants = len({one.tenant for one in jobs})
    waits: dict[tuple[Lane, str], int] = defaultdict(int)
    num_run = 0
    while (turn := turn_of(backlog, limits)) is not None:
        waiting = {queue[0].tenant for queue in backlog.waiting.values() if lane_of(queue[0].op) == turn.lane}
        for tenant in waiting:
            waits[turn.lane, tenant] = 0 if tenant == turn.tenant else waits[turn.lane, tenant] + 1
            assert waits[turn.lane, tenant] < num_tenants
        for tenant in "abc":
            if tenant not in waiting:
                waits[turn.lane, tenant] = 0
        done = backlog.take(turn)
        backlog.settle(done)
        num_run += len(done)
        if (arrival := next(arriving, None)) is not None:
            backlog.add(entry(arrival[0], arrival[1]))
    assert num_run == len(jobs) - sum(1 for _ in arriving)


@given(log=st.lists(SENT, max_size=60), limits=ANY_LIMITS)
def test_a_model_waits_for_its_tenants_turn_times_its_tenants_models_at_most(log, limits):
    jobs = sent(log)
    backlog = backlog_of(*jobs)
    num_tenants = len({one.tenant for one in jobs})
    num_owners = {tenant: len({one.owner for one in jobs if one.tenant == tenant}) for tenant in "abc"}
    waits: dict[str, int] = defaultdict(int)
    while (turn := turn_of(backlog, limits)) is not None:
        waiting = {
            owner: queue[0].tenant for owner, queue in backlog.waiting.items() if lane_of(queue[0].op) == turn.lane
        }
        done = backlog.take(turn)
        backlog.settle(done)
        served = {one.owner for one in done}
        for owner, tenant in waiting.items():
            waits[owner] = 0 if owner in served else waits[owner] + 1
            assert waits[owner] < num_tenants * num_owners[tenant]
