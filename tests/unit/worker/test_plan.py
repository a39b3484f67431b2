"""Which jobs form the next batch."""

from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.worker_jobs import entry, job, queues

from gradstream.shared.joblog.port import LogEntry
from gradstream.shared.wire import Job
from gradstream.worker.backlog import Backlog
from gradstream.worker.fairness import Fairness, Lane, lane_of
from gradstream.worker.lanes import Lanes
from gradstream.worker.plan import Limits, Turn, next_turn

LIMITS = Limits(batch_tokens=100, batch_jobs=8, row_budget_tokens=50)


def planned(*jobs: Job, limits: Limits = LIMITS, lanes: Lanes | None = None, suspects=()) -> list[str]:
    turn = next_turn(queues(*jobs), limits=limits, lanes=lanes, suspects=suspects)
    assert turn is not None
    return list(turn.plan.future_ids)


def test_nothing_waiting_gives_no_batch():
    assert next_turn({}, limits=LIMITS) is None


def test_forward_backwards_of_several_models_share_a_batch_up_to_their_barriers():
    jobs = [
        job("a", 1, "forward_backward", num_tokens=10),
        job("a", 2, "forward_backward", num_tokens=10),
        job("a", 3, "optim_step"),
        job("a", 4, "forward_backward", num_tokens=10),
        job("b", 1, "forward_backward", num_tokens=10),
    ]
    assert planned(*jobs) == ["a:1", "a:2", "b:1"]


@pytest.mark.parametrize("op", ["forward_backward", "forward", "optim_step"])
def test_a_batch_of_training_has_no_more_models_than_fit_on_the_device(op):
    jobs = [job(model, seq, op, num_tokens=1) for seq in (1, 2) for model in "abc"]
    chosen = planned(*jobs, limits=replace(LIMITS, batch_models=2))
    assert {future.partition(":")[0] for future in chosen} == {"a", "b"}
    assert len(chosen) == (2 if op == "optim_step" else 4)


def test_samples_of_many_models_share_a_batch_as_they_need_no_training_state():
    jobs = [job(model, 1, "sample", num_tokens=1) for model in "abc"]
    assert len(planned(*jobs, limits=replace(LIMITS, batch_models=2))) == 3


def test_optim_steps_of_several_models_share_a_batch_one_each():
    jobs = [job("a", 1, "optim_step"), job("a", 2, "optim_step"), job("b", 1, "optim_step")]
    assert planned(*jobs) == ["a:1", "b:1"]


@pytest.mark.parametrize(
    "op", ["create_model", "load_weights", "save_weights", "save_weights_for_sampler", "unload_model"]
)
def test_ops_on_a_whole_model_run_alone(op):
    assert planned(job("a", 0, op), job("b", 0, op)) == ["a:0"]


def test_forward_does_not_share_a_batch_with_forward_backward():
    assert planned(job("a", 1, "forward_backward"), job("b", 1, "forward")) == ["a:1"]


def test_a_job_larger_than_the_budget_runs_alone():
    large = job("a", 1, "forward_backward", num_tokens=900)
    assert planned(large, job("a", 2, "forward_backward", num_tokens=1)) == ["a:1"]
    assert planned(large, job("b", 1, "forward_backward", num_tokens=900)) == ["a:1"]


def test_a_job_that_does_not_fit_leaves_room_for_a_smaller_one_of_another_owner():
    jobs = [job(owner, 1, "forward_backward", num_tokens=size) for owner, size in [("a", 60), ("b", 50), ("c", 40)]]
    assert planned(*jobs) == ["a:1", "c:1"]


def test_one_owner_alone_fills_a_batch_up_to_its_budget():
    assert len(planned(*(job("a", seq, "forward_backward", num_tokens=25) for seq in range(1, 9)))) == 4


def test_beside_others_first_jobs_fill_a_batch_up_to_its_budget_and_further_ones_up_to_half_of_it():
    jobs = [job("a", seq, "forward_backward", num_tokens=20) for seq in range(1, 5)]
    assert planned(*jobs, job("b", 1, "optim_step")) == ["a:1", "a:2"]
    others = [job(owner, 1, "forward_backward", num_tokens=20) for owner in "bcd"]
    assert planned(*jobs, *others) == ["a:1", "b:1", "c:1", "d:1"]


def test_a_heavy_job_does_not_join_a_batch_that_a_small_one_leads():
    limits = replace(LIMITS, batch_tokens=4096)
    small, heavy = (job(owner, 1, "forward_backward", num_tokens=size) for owner, size in [("s", 48), ("h", 2048)])
    assert planned(heavy, small, limits=limits) == ["s:1"]


def test_a_small_job_joins_a_batch_that_a_heavy_one_leads():
    limits = replace(LIMITS, batch_tokens=4096)
    small, heavy = (job(owner, 1, "forward_backward", num_tokens=size) for owner, size in [("s", 48), ("h", 2048)])
    fairness = Fairness()
    for one in (small, heavy):
        fairness.wait(one)
    fairness.serve([job("s", 0, "forward_backward", num_tokens=3000)], budget_tokens=limits.batch_tokens)
    turn = next_turn(queues(small, heavy), limits=limits, fairness=fairness)
    assert turn is not None
    assert turn.plan.future_ids == ["h:1", "s:1"]


@pytest.mark.parametrize(("lead", "joining", "joins"), [(200, 800, True), (200, 801, False), (1, 128, True)])
def test_neighbours_in_size_share_a_batch(lead, joining, joins):
    limits = replace(LIMITS, batch_tokens=4096)
    jobs = [job("a", 1, "forward_backward", num_tokens=lead), job("b", 1, "forward_backward", num_tokens=joining)]
    assert len(planned(*jobs, limits=limits)) == 1 + joins


def test_strict_isolation_puts_one_owner_in_a_batch():
    jobs = [job("a", 1, "optim_step"), job("b", 1, "optim_step")]
    assert planned(*jobs, limits=Limits(batch_tokens=9, batch_jobs=9, row_budget_tokens=9, is_strict=True)) == ["a:1"]


@pytest.mark.config_field("sample_packing_strategy")
@pytest.mark.parametrize(
    ("op", "packing"),
    [("forward_backward", "best_fit"), ("forward", "best_fit"), ("sample", "sequential"), ("optim_step", "sequential")],
)
def test_plans_of_passes_say_how_rows_are_filled(op, packing):
    limits = Limits(batch_tokens=9, batch_jobs=9, row_budget_tokens=9, packing="best_fit")
    turn = next_turn(queues(job("a", 1, op)), limits=limits)
    assert turn is not None
    assert turn.plan.packing == packing


@pytest.mark.config_field("shared_prompt_tokens")
@pytest.mark.parametrize(("op", "tokens"), [("forward_backward", 9), ("forward", 9), ("sample", 0), ("optim_step", 0)])
def test_plans_of_passes_say_from_what_length_prompts_are_shared(op, tokens):
    limits = Limits(batch_tokens=9, batch_jobs=9, row_budget_tokens=9, shared_prompt_tokens=9)
    turn = next_turn(queues(job("a", 1, op)), limits=limits)
    assert turn is not None
    assert turn.plan.shared_prompt_tokens == tokens


def test_training_and_sampling_alternate_while_both_wait():
    jobs = [job("a", 1, "forward_backward"), job("s", 1, "sample")]
    assert planned(*jobs, lanes=Lanes(last=Lane.TRAIN)) == ["s:1"]
    assert planned(*jobs, lanes=Lanes(last=Lane.SAMPLE)) == ["a:1"]


def test_a_suspect_runs_alone_and_joins_no_other_batch():
    jobs = [job("s", 1, "sample"), job("s", 2, "sample"), job("t", 1, "sample")]
    assert planned(*jobs, suspects={"s:1"}) == ["s:1"]
    assert planned(*jobs, suspects={"s:2"}) == ["s:1", "t:1"]


OPS = st.sampled_from(["forward_backward", "forward", "optim_step", "save_weights", "sample"])
LOGS = st.lists(st.tuples(st.integers(0, 5), OPS, st.integers(0, 120)), max_size=60)
LIMITS_OF_ANY_SIZE = st.builds(
    Limits,
    batch_tokens=st.integers(1, 200),
    batch_jobs=st.integers(1, 10),
    row_budget_tokens=st.just(64),
    is_strict=st.booleans(),
)


def entries_of(log: list[tuple[int, str, int]]) -> list[LogEntry]:
    counts: dict[str, int] = defaultdict(int)
    entries = []
    for number, (who, op, num_tokens) in enumerate(log, start=1):
        owner = f"s{who}" if op == "sample" else f"m{who}"
        counts[owner] += 1
        entries.append(entry(number, job(owner, counts[owner], op, num_tokens=num_tokens)))
    return entries


def run_all(entries: list[LogEntry], limits: Limits) -> list[tuple[Turn, list[Job]]]:
    """Every turn until nothing waits, and its jobs."""
    backlog = Backlog(cursor="0-0")
    for one in entries:
        backlog.add(one)
    turns = []
    while (
        turn := next_turn(backlog.waiting, limits=limits, lanes=backlog.lanes, fairness=backlog.fairness)
    ) is not None:
        jobs = backlog.take(turn)
        backlog.settle(jobs)
        turns.append((turn, jobs))
    assert len(backlog) == 0
    return turns


@given(log=LOGS, limits=LIMITS_OF_ANY_SIZE)
def test_every_job_runs_once_in_its_owners_order_and_batches_keep_their_bounds(log, limits):
    entries = entries_of(log)
    seen: dict[str, list[int]] = defaultdict(list)
    for turn, jobs in run_all(entries, limits):
        assert [one.future_id for one in jobs] == turn.plan.future_ids
        assert {one.op for one in jobs} == {turn.plan.kind}
        assert len(jobs) <= limits.batch_jobs
        assert len(jobs) == 1 or sum(max(one.num_tokens, 1) for one in jobs) <= limits.batch_tokens
        assert not limits.is_strict or len({one.owner for one in jobs}) == 1
        for one in jobs:
            seen[one.owner].append(one.seq)
    for owner, seqs in seen.items():
        assert seqs == sorted(one.job.seq for one in entries if one.job.owner == owner)
    assert sum(map(len, seen.values())) == len(entries)


@given(log=LOGS, limits=LIMITS_OF_ANY_SIZE)
def test_no_lane_runs_twice_in_a_row_while_the_other_waits(log, limits):
    backlog = Backlog(cursor="0-0")
    for one in entries_of(log):
        backlog.add(one)
    while (turn := next_turn(backlog.waiting, limits=limits, lanes=backlog.lanes)) is not None:
        lanes = {lane_of(jobs[0].op) for jobs in backlog.waiting.values()}
        assert len(lanes) == 1 or turn.lane != backlog.lanes.last
        backlog.take(turn)
