"""Which waiting jobs run together next: a pure decision over plain data.

The rules:
- A batch holds jobs of one op. forward_backward, forward and sample take several jobs of several owners; optim_step takes one
  job each of several owners; every other op runs alone.
- A batch of training holds jobs of a bounded number of owners: as many as have their models on the device at a time.
- Jobs of one owner are taken from the front of its queue, so its order never changes.
- Who leads a batch, and in what order others join it, follows from what everybody was served (`fairness.py`): tenants first, then the
  owners within one, so that many models get their tenant no more than one does. The leader decides the op, and its first job is
  always in.
- A job of training joins only if it has at most `_JOINING_RATIO` times the leader's tokens, or is small anyway: a heavy one does not
  prolong a batch that a small one leads, while small ones join any batch that has room.
- While several owners are active, only their first jobs fill a batch up to its budget, further ones up to half of it: what others
  wait for is the batch that runs.
- Training and sampling are two lanes that get the same time while both have work (`lanes.py`), in turns of one batch of training or one
  slice, so neither waits for the whole queue of the other. A sample that can begin waits for one batch of training at most.
- A batch of samples is a slice: its jobs join the samples that run, and all of those are continued by a bounded number of tokens.
  The sample in turn joins as soon as there is room for it. Until then only those join that come before it by what was served, so
  that small ones cannot keep a large one out for ever.
- A suspect, a job that was running when a gang died, runs alone, so that a second death convicts the right one. A suspected sample
  starts when no other runs, and no training runs before it has ended.

What follows within each lane, in costs (`fairness.cost`):
- A job waits for the batch that runs when it comes, and then for jobs that would end before it if all that wait were served alike:
  smaller ones, and those of tenants that have waited for their share. So the ops of a small tenant wait for no second batch of heavy
  ones, as long as a heavy job costs more than the small one's ops together, times the number of heavy tenants.
- Nobody starves: while a tenant waits and none of its jobs is served, batches of a cost of at most N * (L + 2 * M) run, of N tenants,
  with L the largest cost of its jobs and M that of a batch, at least the budget. So do owners within what their tenant is served.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import msgspec

from gradstream.shared.ids import FutureId, OwnerId
from gradstream.shared.wire import Job, Plan
from gradstream.worker.contest import Contest
from gradstream.worker.fairness import JOB_TOKENS, SHARED_OPS, Fairness, Lane, lane_of
from gradstream.worker.lanes import Lanes

_SEVERAL_OF_ONE_OWNER = frozenset({"forward_backward", "forward", "sample"})
# Whose datums are put into rows by the plan.
_PACKED = frozenset({"forward_backward", "forward"})
# How many times the leader's tokens a job that joins may have. Neighbours in size share batches.
_JOINING_RATIO = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one batch. batch_tokens is exceeded only by a batch of a single job. batch_models: owners of one batch of training.
    is_strict: one owner a batch, and rows of one job each. packing: how rows are filled. shared_prompt_tokens: see Plan.

    running_jobs, running_tokens: of all samples that run at a time; one alone may exceed them. slice_steps: tokens by which a slice
    continues each of them, joining_slice_steps where others join in it and no training waits: those may be short ones.
    """

    batch_tokens: int
    batch_jobs: int
    row_budget_tokens: int
    batch_models: int = 64
    packing: Literal["sequential", "best_fit"] = "sequential"
    shared_prompt_tokens: int = 0
    is_strict: bool = False
    running_jobs: int = 64
    running_tokens: int = 131_072
    slice_steps: int = 16
    joining_slice_steps: int = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The next batch: its plan, its lane, and how many jobs it takes from the front of each owner's queue, the leader's first.

    A slice that no sample joins takes none. budget_tokens: how far ahead of others the batch may leave those that it serves.
    """

    plan: Plan
    num_taken: Mapping[OwnerId, int]
    lane: Lane
    budget_tokens: int


def next_turn(
    waiting: Mapping[OwnerId, Sequence[Job]],
    *,
    limits: Limits,
    lanes: Lanes | None = None,
    fairness: Fairness | None = None,
    suspects: Collection[FutureId] = (),
    running: Collection[Job] = (),
) -> Turn | None:
    """The next batch, or None when nothing waits or runs.

    waiting: each owner's jobs in order, none of them empty; of equals the first leads. lanes, fairness: what both lanes and everybody
    were served, by default the same. running: samples that have not ended.
    """
    if any(job.future_id in suspects for job in running):
        return _slice(None, waiting, limits)
    fairness = fairness or Fairness()
    newcomer = _lead(waiting, Lane.SAMPLE, fairness)
    if newcomer is not None and not _may_join(newcomer, running, limits, suspects):
        newcomer = None
    lane = (lanes or Lanes()).choose(wanted_lanes(waiting, running), is_joining=newcomer is not None)
    if lane is None:
        return None
    if lane is Lane.SAMPLE:
        if newcomer is None:
            return _slice(None, waiting, limits)
        return _slice(_batch(newcomer, waiting, fairness, _room(limits, running), suspects), waiting, limits)
    lead = _lead(waiting, Lane.TRAIN, fairness)
    assert lead is not None, "a lane of training is chosen when training waits"
    return _batch(lead, waiting, fairness, limits, suspects)


def _lead(waiting: Mapping[OwnerId, Sequence[Job]], lane: Lane, fairness: Fairness) -> Job | None:
    """The job that leads the next batch of the lane."""
    contest = Contest(lane, fairness)
    for jobs in waiting.values():
        if lane_of(jobs[0].op) is lane:
            contest.enter(jobs[0])
    return contest.pop()


def _batch(
    lead: Job,
    waiting: Mapping[OwnerId, Sequence[Job]],
    fairness: Fairness,
    limits: Limits,
    suspects: Collection[FutureId],
) -> Turn:
    """The batch that this job leads."""
    if lead.future_id in suspects or lead.op not in SHARED_OPS:
        num_taken: Mapping[OwnerId, int] = {lead.owner: 1}
    else:
        num_taken = _fill(lead, waiting, fairness, limits, suspects)
    future_ids = [job.future_id for owner, count in num_taken.items() for job in islice(waiting[owner], count)]
    plan = Plan(
        kind=lead.op,
        future_ids=future_ids,
        row_budget_tokens=limits.row_budget_tokens,
        isolate_jobs=limits.is_strict,
        packing=limits.packing if lead.op in _PACKED else "sequential",
        shared_prompt_tokens=limits.shared_prompt_tokens if lead.op in _PACKED else 0,
    )
    return Turn(plan=plan, num_taken=num_taken, lane=lane_of(lead.op), budget_tokens=limits.batch_tokens)


def _slice(joining: Turn | None, waiting: Mapping[OwnerId, Sequence[Job]], limits: Limits) -> Turn:
    """A batch of samples, or none, as a slice."""
    if joining is None:
        plan = Plan(kind="sample", future_ids=[], row_budget_tokens=limits.row_budget_tokens)
        joining = Turn(plan=plan, num_taken={}, lane=Lane.SAMPLE, budget_tokens=0)
    is_training = any(lane_of(jobs[0].op) is Lane.TRAIN for jobs in waiting.values())
    num_steps = limits.joining_slice_steps if joining.plan.future_ids and not is_training else limits.slice_steps
    return replace(joining, plan=msgspec.structs.replace(joining.plan, num_steps=num_steps))


def _may_join(lead: Job, running: Collection[Job], limits: Limits, suspects: Collection[FutureId]) -> bool:
    """True when there is room for a sample beside those that run."""
    if not running:
        return True
    if lead.future_id in suspects or (limits.is_strict and any(job.owner != lead.owner for job in running)):
        return False
    room = _room(limits, running)
    return room.batch_jobs >= 1 and _tokens(lead) <= limits.running_tokens - sum(map(_tokens, running))


def _room(limits: Limits, running: Collection[Job]) -> Limits:
    """Bounds of the batch that may join those that run."""
    num_tokens = limits.running_tokens - sum(map(_tokens, running))
    return replace(
        limits,
        batch_jobs=min(limits.batch_jobs, limits.running_jobs - len(running)),
        batch_tokens=min(limits.batch_tokens, num_tokens),
    )


def _tokens(job: Job) -> int:
    """What a job takes of a budget."""
    return max(job.num_tokens, 1)


def wanted_lanes(waiting: Mapping[OwnerId, Sequence[Job]], running: Collection[object]) -> list[Lane]:
    """The lanes that have work. running: samples that have not ended."""
    lanes = [lane_of(jobs[0].op) for jobs in waiting.values()]
    return [*lanes, Lane.SAMPLE] if running else lanes


@dataclass(slots=True, kw_only=True)
class _Filling:
    """A batch while it is filled. is_shared: more than one owner is active."""

    lead: Job
    limits: Limits
    is_shared: bool
    num_taken: Counter[OwnerId] = field(default_factory=Counter)
    num_tokens: int = 0

    def add(self, job: Job) -> None:
        self.num_taken[job.owner] += 1
        self.num_tokens += _tokens(job)

    def has_room(self, job: Job) -> bool:
        """True when this job may be added."""
        limits = self.limits
        num_tokens = self.num_tokens + _tokens(job)
        if num_tokens > limits.batch_tokens:
            return False
        if lane_of(job.op) is Lane.SAMPLE:
            return True
        if job.owner in self.num_taken:
            return not self.is_shared or num_tokens <= limits.batch_tokens // 2
        is_near = job.num_tokens <= max(_JOINING_RATIO * self.lead.num_tokens, JOB_TOKENS)
        return is_near and len(self.num_taken) < limits.batch_models


def _fill(
    lead: Job,
    waiting: Mapping[OwnerId, Sequence[Job]],
    fairness: Fairness,
    limits: Limits,
    suspects: Collection[FutureId],
) -> Mapping[OwnerId, int]:
    """How many jobs to take from the front of each queue; the leader's first job is always one of them."""
    lane = lane_of(lead.op)
    contest = Contest(lane, fairness)
    batch = _Filling(lead=lead, limits=limits, is_shared=fairness.is_active(lane, beside=lead.owner))

    def enter(job: Job) -> None:
        if job.op == lead.op and job.future_id not in suspects:
            contest.enter(job)

    def take(job: Job) -> None:
        batch.add(job)
        contest.serve(job)
        following = _at(waiting[job.owner], batch.num_taken[job.owner])
        # One of another tenant waits until it is at the front, so that the batch is charged to those that wait.
        if lead.op in _SEVERAL_OF_ONE_OWNER and following is not None and following.tenant == job.tenant:
            enter(following)

    for owner, jobs in waiting.items():
        if owner != lead.owner and not limits.is_strict:
            batch.is_shared |= lane_of(jobs[0].op) is lane
            enter(jobs[0])
    take(lead)
    while batch.num_taken.total() < limits.batch_jobs and (job := contest.pop()) is not None:
        if batch.has_room(job):
            take(job)
    return batch.num_taken


def _at(jobs: Sequence[Job], index: int) -> Job | None:
    return jobs[index] if index < len(jobs) else None
