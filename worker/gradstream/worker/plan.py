"""Which waiting jobs run together next: a pure decision over plain data.

The rules:
- A batch holds jobs of one op. forward_backward, forward and sample take several jobs of several owners; optim_step takes one
  job each of several owners; every other op runs alone.
- Jobs of one owner are taken from the front of its queue, so its order never changes.
- Owners come in turn: the first one decides the op and always gets its first job in. The rest of the budget is shared by tokens,
  the owner with the fewest tokens in the batch next. Served owners go to the end of the turn (`backlog.py`), so with N waiting
  owners a job at the front of its queue waits for less than N batches of its lane.
- Training and sampling are two lanes that alternate while both wait, so neither waits for the whole queue of the other.
- A suspect, a job that was running when a gang died, runs alone, so that a second death convicts the right one.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

from gradstream.shared.ids import FutureId, OwnerId
from gradstream.shared.wire import Job, Plan

_SEVERAL_OF_ONE_OWNER = frozenset({"forward_backward", "forward", "sample"})
_SEVERAL_OWNERS = _SEVERAL_OF_ONE_OWNER | {"optim_step"}


class Lane(StrEnum):
    """What kinds of work alternate."""

    TRAIN = "train"
    SAMPLE = "sample"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one batch. batch_tokens is exceeded only by a batch of a single job. is_strict: one owner a batch."""

    batch_tokens: int
    batch_jobs: int
    row_budget_tokens: int
    is_strict: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The next batch: its plan, how many jobs it takes from the front of each owner's queue, and its lane."""

    plan: Plan
    num_taken: Mapping[OwnerId, int]
    lane: Lane


def lane_of(op: str) -> Lane:
    """The lane a job of this op waits in."""
    return Lane.SAMPLE if op == "sample" else Lane.TRAIN


def next_turn(
    waiting: Mapping[OwnerId, Sequence[Job]],
    *,
    limits: Limits,
    last_lane: Lane | None = None,
    suspects: Collection[FutureId] = (),
) -> Turn | None:
    """The next batch, or None when nothing waits.

    waiting: each owner's jobs in order, none of them empty, the owners in order of turn.
    """
    lane = _next_lane(waiting, last_lane)
    if lane is None:
        return None
    heads = [owner for owner, jobs in waiting.items() if lane_of(jobs[0].op) == lane]
    lead = waiting[heads[0]][0]
    if lead.future_id in suspects or lead.op not in _SEVERAL_OWNERS:
        num_taken = {lead.owner: 1}
    else:
        owners = heads[:1] if limits.is_strict else heads
        num_taken = _fill({owner: waiting[owner] for owner in owners}, lead.op, limits, suspects)
    future_ids = [job.future_id for owner, count in num_taken.items() for job in islice(waiting[owner], count)]
    plan = Plan(kind=lead.op, future_ids=future_ids, row_budget_tokens=limits.row_budget_tokens)
    return Turn(plan=plan, num_taken=num_taken, lane=lane)


def _next_lane(waiting: Mapping[OwnerId, Sequence[Job]], last_lane: Lane | None) -> Lane | None:
    lanes = [lane_of(jobs[0].op) for jobs in waiting.values()]
    if not lanes:
        return None
    others = [lane for lane in lanes if lane != last_lane]
    return others[0] if others else lanes[0]


def _fill(
    waiting: Mapping[OwnerId, Sequence[Job]], op: str, limits: Limits, suspects: Collection[FutureId]
) -> dict[OwnerId, int]:
    """How many jobs to take from the front of each queue; the first owner's first job is always one of them."""
    num_taken = dict.fromkeys(waiting, 0)
    total_tokens = total_jobs = 0
    # Fewest tokens first; the turn breaks ties, so the lead is popped first.
    heap = [(0, turn, owner) for turn, owner in enumerate(waiting)]
    while heap and total_jobs < limits.batch_jobs:
        owner_tokens, turn, owner = heapq.heappop(heap)
        job = _at(waiting[owner], num_taken[owner])
        if job is None or job.op != op or job.future_id in suspects:
            continue
        cost = max(job.num_tokens, 1)
        if total_jobs and total_tokens + cost > limits.batch_tokens:
            continue
        num_taken[owner] += 1
        total_jobs += 1
        total_tokens += cost
        if op in _SEVERAL_OF_ONE_OWNER:
            heapq.heappush(heap, (owner_tokens + cost, turn, owner))
    return {owner: count for owner, count in num_taken.items() if count}


def _at(jobs: Sequence[Job], index: int) -> Job | None:
    return jobs[index] if index < len(jobs) else None
