"""Which waiting jobs run together next: a pure decision over plain data.

The rules:
- A batch holds jobs of one op. forward_backward, forward and sample take several jobs of several owners; optim_step takes one
  job each of several owners; every other op runs alone.
- A batch of training holds jobs of a bounded number of owners: as many as have their models on the device at a time.
- Jobs of one owner are taken from the front of its queue, so its order never changes.
- Tenants come in turn, and within a tenant its owners, so that many models get their tenant no more turns than one does. The
  tenant that led a batch of the lane least recently leads this one: its first owner decides the op and always gets its first job in.
  The rest of the budget is shared by tokens: the tenant with the fewest in the batch next, and of its owners the one with the fewest.
- Only leading moves a tenant to the end of the turn, while any service moves an owner there (`backlog.py`). So with N waiting tenants
  a tenant waits for less than N batches of its lane, and one of its M owners for less than N * M, whatever the others send.
- Training and sampling are two lanes that alternate while both wait, so neither waits for the whole queue of the other.
- A batch of samples is a slice: its jobs join the samples that run, and all of those are continued by a bounded number of tokens.
  The sample in turn joins as soon as there is room for it. Until then none joins, so that small ones cannot keep a large one out.
- A suspect, a job that was running when a gang died, runs alone, so that a second death convicts the right one. A suspected sample
  starts when no other runs, and no training runs before it has ended.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import islice
from typing import Literal

import msgspec

from gradstream.shared.ids import FutureId, OwnerId, TenantId
from gradstream.shared.wire import Job, Plan

_SEVERAL_OF_ONE_OWNER = frozenset({"forward_backward", "forward", "sample"})
# Whose datums are put into rows by the plan.
_PACKED = frozenset({"forward_backward", "forward"})
_SEVERAL_OWNERS = _SEVERAL_OF_ONE_OWNER | {"optim_step"}


class Lane(StrEnum):
    """What kinds of work alternate."""

    TRAIN = "train"
    SAMPLE = "sample"


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
    """The next batch: its plan, how many jobs it takes from the front of each owner's queue, its lane, and whose turn it was.

    tenant None: a slice that no sample joins.
    """

    plan: Plan
    num_taken: Mapping[OwnerId, int]
    lane: Lane
    tenant: TenantId | None


# When each tenant led a batch of each lane last, as a number that grows; who never did is absent.
LastLed = Mapping[tuple[Lane, TenantId], int]


def lane_of(op: str) -> Lane:
    """The lane a job of this op waits in."""
    return Lane.SAMPLE if op == "sample" else Lane.TRAIN


def next_turn(
    waiting: Mapping[OwnerId, Sequence[Job]],
    *,
    limits: Limits,
    last_lane: Lane | None = None,
    last_led: LastLed | None = None,
    suspects: Collection[FutureId] = (),
    running: Collection[Job] = (),
) -> Turn | None:
    """The next batch, or None when nothing waits or runs.

    waiting: each owner's jobs in order, none of them empty, the owners in order of turn. running: samples that have not ended.
    """
    if any(job.future_id in suspects for job in running):
        return _slice(None, waiting, limits)
    lane = _next_lane(waiting, last_lane, is_sampling=bool(running))
    if lane is None:
        return None
    heads = _in_turn(waiting, lane, last_led or {})
    if lane is Lane.TRAIN:
        return _batch(heads, waiting, limits, suspects)
    lead = waiting[heads[0]][0] if heads else None
    if lead is None or not _may_join(lead, running, limits, suspects):
        return _slice(None, waiting, limits)
    return _slice(_batch(heads, waiting, _room(limits, running), suspects), waiting, limits)


def _batch(
    heads: Sequence[OwnerId], waiting: Mapping[OwnerId, Sequence[Job]], limits: Limits, suspects: Collection[FutureId]
) -> Turn:
    """The batch that the first of these owners leads."""
    lead = waiting[heads[0]][0]
    if lead.future_id in suspects or lead.op not in _SEVERAL_OWNERS:
        num_taken = {lead.owner: 1}
    else:
        owners = heads[:1] if limits.is_strict else heads
        num_taken = _fill({owner: waiting[owner] for owner in owners}, lead.op, limits, suspects)
    future_ids = [job.future_id for owner, count in num_taken.items() for job in islice(waiting[owner], count)]
    plan = Plan(
        kind=lead.op,
        future_ids=future_ids,
        row_budget_tokens=limits.row_budget_tokens,
        isolate_jobs=limits.is_strict,
        packing=limits.packing if lead.op in _PACKED else "sequential",
        shared_prompt_tokens=limits.shared_prompt_tokens if lead.op in _PACKED else 0,
    )
    return Turn(plan=plan, num_taken=num_taken, lane=lane_of(lead.op), tenant=lead.tenant)


def _slice(joining: Turn | None, waiting: Mapping[OwnerId, Sequence[Job]], limits: Limits) -> Turn:
    """A batch of samples, or none, as a slice."""
    if joining is None:
        plan = Plan(kind="sample", future_ids=[], row_budget_tokens=limits.row_budget_tokens)
        joining = Turn(plan=plan, num_taken={}, lane=Lane.SAMPLE, tenant=None)
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
    return room.batch_jobs >= 1 and _cost(lead) <= limits.running_tokens - sum(map(_cost, running))


def _room(limits: Limits, running: Collection[Job]) -> Limits:
    """Bounds of the batch that may join those that run."""
    num_tokens = limits.running_tokens - sum(map(_cost, running))
    return replace(
        limits,
        batch_jobs=min(limits.batch_jobs, limits.running_jobs - len(running)),
        batch_tokens=min(limits.batch_tokens, num_tokens),
    )


def _cost(job: Job) -> int:
    return max(job.num_tokens, 1)


def _in_turn(waiting: Mapping[OwnerId, Sequence[Job]], lane: Lane, last_led: LastLed) -> list[OwnerId]:
    """The owners that wait in the lane: by their tenants' turns, then by their own."""
    heads = [owner for owner, jobs in waiting.items() if lane_of(jobs[0].op) == lane]
    return sorted(heads, key=lambda owner: last_led.get((lane, waiting[owner][0].tenant), -1))


def _next_lane(waiting: Mapping[OwnerId, Sequence[Job]], last_lane: Lane | None, *, is_sampling: bool) -> Lane | None:
    lanes = [lane_of(jobs[0].op) for jobs in waiting.values()]
    if is_sampling:
        lanes.append(Lane.SAMPLE)
    if not lanes:
        return None
    others = [lane for lane in lanes if lane != last_lane]
    return others[0] if others else lanes[0]


@dataclass(order=True, slots=True)
class _Share:
    """What one owner or tenant has of the batch so far. Fewest tokens first; the turn breaks ties."""

    num_tokens: int
    turn: int


@dataclass(order=True, slots=True)
class _OwnerShare(_Share):
    owner: OwnerId = field(compare=False)


@dataclass(order=True, slots=True)
class _TenantShare(_Share):
    """owners: a heap of those that may have more jobs for this batch."""

    owners: list[_OwnerShare] = field(compare=False, default_factory=list)


def _fill(
    waiting: Mapping[OwnerId, Sequence[Job]], op: str, limits: Limits, suspects: Collection[FutureId]
) -> dict[OwnerId, int]:
    """How many jobs to take from the front of each queue; the first owner's first job is always one of them."""
    num_taken = dict.fromkeys(waiting, 0)
    total_tokens = total_jobs = 0
    heap = _shares(waiting)
    num_models = 0
    max_models = limits.batch_models if lane_of(op) is Lane.TRAIN else limits.batch_jobs
    while heap and total_jobs < limits.batch_jobs:
        tenant = heapq.heappop(heap)
        share = heapq.heappop(tenant.owners)
        job = _at(waiting[share.owner], num_taken[share.owner])
        if job is not None and job.op == op and job.future_id not in suspects:
            cost = _cost(job)
            is_new = not num_taken[share.owner]
            has_room = not total_jobs or total_tokens + cost <= limits.batch_tokens
            if has_room and num_models + is_new <= max_models:
                num_taken[share.owner] += 1
                num_models += is_new
                total_jobs += 1
                total_tokens += cost
                tenant.num_tokens += cost
                if op in _SEVERAL_OF_ONE_OWNER:
                    share.num_tokens += cost
                    heapq.heappush(tenant.owners, share)
        if tenant.owners:
            heapq.heappush(heap, tenant)
    return {owner: count for owner, count in num_taken.items() if count}


def _shares(waiting: Mapping[OwnerId, Sequence[Job]]) -> list[_TenantShare]:
    """Empty shares in order of turn, which makes each list of them a heap."""
    tenants: dict[TenantId, _TenantShare] = {}
    for turn, (owner, jobs) in enumerate(waiting.items()):
        tenant = tenants.setdefault(jobs[0].tenant, _TenantShare(num_tokens=0, turn=turn))
        tenant.owners.append(_OwnerShare(num_tokens=0, turn=turn, owner=owner))
    return list(tenants.values())


def _at(jobs: Sequence[Job], index: int) -> Job | None:
    return jobs[index] if index < len(jobs) else None
