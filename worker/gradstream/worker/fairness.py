"""Who has been served how much: fair queueing of tenants, and of the owners within each tenant, in tokens.

Each lane has a virtual time `now`: what each of those that wait would have been served since the start, had all been served alike. A
batch moves it by the batch's cost, divided by how many waited. Everybody has a tag on that scale: what it was itself served.

- The one whose next job would end first, by its tag and the job's cost, leads. So of two that were served alike the one with the
  smaller job goes first, and one that was served more waits until the others have caught up.
- A tag is lifted to `now` when one begins to wait, and after it was served: idling saves up nothing.
- A tag is at most a batch's budget ahead of `now`, so what one took while nobody else wanted it is not held against it for long.
- `now` moves with every batch, also where each is for somebody new: no stream of small jobs keeps a large one waiting for ever.

The scheme is weighted fair queueing (Demers, Keshav and Shenker 1989) with equal weights, its virtual time driven by what was served
instead of by a clock, as in self-clocked fair queueing (Golestani 1994), and served tokens as the unit, as in the virtual token counter
of Sheng et al. 2024, "Fairness in Serving Large Language Models".

Nothing here is stored: plans are in the log, so a replay asks nobody whose turn it was, and after a restart all begin with equal tags.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from enum import StrEnum
from typing import Generic, TypeVar

from gradstream.shared.ids import OwnerId, TenantId
from gradstream.shared.wire import Job

# What a job costs at least. Below about this many tokens an op's fixed work (the log, the broadcast, one pass through the layers or one
# over the optimizer's state) takes most of its time. So an optim_step costs as much as the smallest pass, and of two small jobs
# neither is the smaller one.
JOB_TOKENS = 128
# What an op costs that nobody can share a batch with: it works on files and holds everybody up meanwhile.
ALONE_TOKENS = 4 * JOB_TOKENS
# Ops of which one batch may serve several owners.
SHARED_OPS = frozenset({"forward_backward", "forward", "sample", "optim_step"})
# Batches of its lane for which one that was served counts as active.
_ACTIVE_BATCHES = 16

K = TypeVar("K", bound=Hashable)


class Lane(StrEnum):
    """What kinds of work alternate."""

    TRAIN = "train"
    SAMPLE = "sample"


def lane_of(op: str) -> Lane:
    """The lane a job of this op waits in."""
    return Lane.SAMPLE if op == "sample" else Lane.TRAIN


def cost(job: Job) -> int:
    """What a job is charged, in tokens."""
    return max(job.num_tokens, JOB_TOKENS if job.op in SHARED_OPS else ALONE_TOKENS)


class Shares(Generic[K]):
    """The tags of those that compete on one level. Those that are absent have been served as much as anybody."""

    def __init__(self) -> None:
        self.now = 0.0
        self._tags: dict[K, float] = {}
        self._waiting: set[K] = set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def tag(self, key: K) -> float:
        """What one was served, on the scale of `now`; below it for one that has waited while others were served."""
        return self._tags.get(key, self.now)

    def wait(self, key: K) -> None:
        """One waits from now on, unless it does already."""
        if key not in self._waiting:
            self._waiting.add(key)
            self._tags[key] = max(self.tag(key), self.now)

    def leave(self, key: K) -> None:
        """One waits no longer; it keeps its tag as long as that is ahead."""
        self._waiting.discard(key)
        self._forget([key])

    def serve(self, costs: Mapping[K, int], *, budget_tokens: int) -> None:
        """Charge one batch to those it serves, all of which wait."""
        self.now += sum(costs.values()) / len(self._waiting)
        for key, tokens in costs.items():
            ahead = self.now + max(tokens, budget_tokens)
            self._tags[key] = min(max(self.tag(key) + tokens, self.now), ahead)
        self._forget(list(self._tags))

    def _forget(self, keys: Sequence[K]) -> None:
        for key in keys:
            if key not in self._waiting and self._tags.get(key, self.now) <= self.now:
                self._tags.pop(key, None)


class Fairness:
    """The shares of tenants, and of each tenant's owners, in both lanes. One thread."""

    def __init__(self) -> None:
        self.tenants: dict[Lane, Shares[TenantId]] = {lane: Shares() for lane in Lane}
        self._owners: dict[tuple[Lane, TenantId], Shares[OwnerId]] = {}
        # Owners by the number of the batch of their lane that served them last, oldest first.
        self._active: dict[Lane, OrderedDict[OwnerId, int]] = {lane: OrderedDict() for lane in Lane}
        self._num_batches: Counter[Lane] = Counter()

    def owners(self, lane: Lane, tenant: TenantId) -> Shares[OwnerId]:
        """The shares within a tenant."""
        return self._owners.get((lane, tenant)) or Shares()

    def is_active(self, lane: Lane, *, beside: OwnerId) -> bool:
        """True when a batch served another owner than this one lately."""
        return any(owner != beside for owner in self._active[lane])

    def wait(self, head: Job) -> None:
        """This job is at the front of its owner's queue."""
        lane = lane_of(head.op)
        self._owners.setdefault((lane, head.tenant), Shares()).wait(head.owner)
        self.tenants[lane].wait(head.tenant)

    def leave(self, head: Job) -> None:
        """This job was taken from the front of its owner's queue; the next one waits by a call of its own."""
        lane = lane_of(head.op)
        owners = self._owners[lane, head.tenant]
        owners.leave(head.owner)
        if not owners.num_waiting:
            self.tenants[lane].leave(head.tenant)

    def serve(self, jobs: Sequence[Job], *, budget_tokens: int) -> None:
        """Charge a batch of jobs of one lane, whose owners all wait."""
        lane = lane_of(jobs[0].op)
        by_tenant: dict[TenantId, Counter[OwnerId]] = defaultdict(Counter)
        for job in jobs:
            by_tenant[job.tenant][job.owner] += cost(job)
        for tenant, by_owner in by_tenant.items():
            self._owners[lane, tenant].serve(by_owner, budget_tokens=budget_tokens)
        totals = {tenant: by_owner.total() for tenant, by_owner in by_tenant.items()}
        self.tenants[lane].serve(totals, budget_tokens=budget_tokens)
        self._note_active(lane, [job.owner for job in jobs])

    def _note_active(self, lane: Lane, owners: Sequence[OwnerId]) -> None:
        self._num_batches[lane] += 1
        active = self._active[lane]
        for owner in owners:
            active[owner] = self._num_batches[lane]
            active.move_to_end(owner)
        while next(iter(active.values())) <= self._num_batches[lane] - _ACTIVE_BATCHES:
            active.popitem(last=False)
