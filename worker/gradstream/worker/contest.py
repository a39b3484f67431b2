"""Whose job comes next among those that wait in a lane, by what their tenants and owners were served."""

import heapq

from gradstream.shared.ids import OwnerId, TenantId
from gradstream.shared.wire import Job
from gradstream.worker.fairness import Fairness, Lane, cost


class Contest:
    """Jobs that compete, at most one of each owner at a time.

    The tenant whose job would leave it with the lowest tag is next; its job is of the owner for which the same holds. Of equals passes
    come before updates, since more updates can share a batch afterwards: models that train in step get into step. Else they come as
    they entered. All enter before the first `pop`; afterwards only the next job of the owner that was popped last does.
    """

    def __init__(self, lane: Lane, fairness: Fairness) -> None:
        self._lane = lane
        self._fairness = fairness
        self._places: dict[OwnerId, int] = {}
        self._tenant_tags: dict[TenantId, float] = {}
        self._owner_tags: dict[OwnerId, float] = {}
        # Heaps of the tag that a job would leave, whether it is an update, its owner's place, which is nobody else's, and the job or its tenant.
        self._jobs: dict[TenantId, list[tuple[float, bool, int, Job]]] = {}
        self._tenants: list[tuple[float, bool, int, TenantId]] | None = None
        self._popped: TenantId | None = None

    def enter(self, job: Job) -> None:
        """This job competes."""
        place = self._places.setdefault(job.owner, len(self._places))
        finish = self._owner_tag(job) + cost(job)
        heapq.heappush(self._jobs.setdefault(job.tenant, []), (finish, job.op == "optim_step", place, job))

    def serve(self, job: Job) -> None:
        """This job is in the batch: what its tenant and its owner are served by it counts for their next ones."""
        self._tenant_tags[job.tenant] = self._tenant_tag(job.tenant) + cost(job)
        self._owner_tags[job.owner] = self._owner_tag(job) + cost(job)

    def pop(self) -> Job | None:
        """The next job, which competes no longer, or None."""
        if self._tenants is None:
            self._tenants = []
            for tenant in self._jobs:
                self._enter_tenant(tenant)
        elif self._popped is not None:
            self._enter_tenant(self._popped)
        self._popped = None
        if not self._tenants:
            return None
        *_, self._popped = heapq.heappop(self._tenants)
        *_, job = heapq.heappop(self._jobs[self._popped])
        return job

    def _enter_tenant(self, tenant: TenantId) -> None:
        if self._tenants is not None and (jobs := self._jobs[tenant]):
            _, is_update, place, job = jobs[0]
            heapq.heappush(self._tenants, (self._tenant_tag(tenant) + cost(job), is_update, place, tenant))

    def _tenant_tag(self, tenant: TenantId) -> float:
        if (tag := self._tenant_tags.get(tenant)) is None:
            tag = self._tenant_tags[tenant] = self._fairness.tenants[self._lane].tag(tenant)
        return tag

    def _owner_tag(self, job: Job) -> float:
        if (tag := self._owner_tags.get(job.owner)) is None:
            tag = self._owner_tags[job.owner] = self._fairness.owners(self._lane, job.tenant).tag(job.owner)
        return tag
