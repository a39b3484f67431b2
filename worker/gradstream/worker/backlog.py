"""The jobs that were read and have no outcome: those that wait, by owner and in order of turn, those that run, and the cursor."""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from itertools import islice

from gradstream.shared.ids import FutureId, OwnerId
from gradstream.shared.joblog.port import LogEntry
from gradstream.shared.wire import Job
from gradstream.worker.fairness import Fairness, lane_of
from gradstream.worker.lanes import Lanes
from gradstream.worker.plan import Turn, wanted_lanes


class Backlog:
    """Holds entries from reading until their commit. One thread.

    An entry is *waiting* until a turn takes it, then *running* until `settle`; samples run for several turns. The cursor is the id of the
    last entry before the oldest one that is not settled, so that reading from it sees every open job again.
    """

    def __init__(self, *, cursor: str, starts: Mapping[FutureId, int] | None = None) -> None:
        self._queues: dict[OwnerId, deque[Job]] = {}
        self._running: dict[FutureId, Job] = {}
        # Entry id to the id of the entry before it.
        self._unsettled: OrderedDict[str, str] = OrderedDict()
        self._entry_of: dict[FutureId, str] = {}
        self._last_seen = cursor
        # How long each lane ran since this gang leads.
        self.lanes = Lanes()
        # What everybody was served since this gang leads.
        self.fairness = Fairness()
        # Open jobs that were running when an earlier gang died, and how many gangs that was.
        self.starts: dict[FutureId, int] = dict(starts or {})

    def __len__(self) -> int:
        return len(self._entry_of)

    @property
    def cursor(self) -> str:
        """The id of the last entry before the oldest open one."""
        return next(iter(self._unsettled.values()), self._last_seen)

    @property
    def waiting(self) -> Mapping[OwnerId, Sequence[Job]]:
        """Each owner's waiting jobs, none empty, the owners that were served least recently first."""
        return self._queues

    @property
    def running(self) -> Mapping[FutureId, Job]:
        """The jobs that were taken and not settled, in the order in which they were taken."""
        return self._running

    def add(self, entry: LogEntry) -> None:
        """Put an entry behind its owner's others; a new owner comes last in turn. A closed entry only moves the cursor."""
        before, self._last_seen = self._last_seen, entry.entry_id
        if not entry.is_open:
            return
        job = entry.job
        self._unsettled[entry.entry_id] = before
        self._entry_of[job.future_id] = entry.entry_id
        if entry.starts:
            self.starts[job.future_id] = max(entry.starts, self.starts.get(job.future_id, 0))
        if job.owner not in self._queues:
            self._queues[job.owner] = deque()
            self.fairness.wait(job)
        self._queues[job.owner].append(job)

    def take(self, turn: Turn) -> list[Job]:
        """The turn's jobs in the plan's order, charged to who sent them; their owners go to the end of the turn among equals."""
        self.lanes.take(turn.lane, wanted_lanes(self._queues, self._running))
        jobs = [job for owner, count in turn.num_taken.items() for job in islice(self._queues[owner], count)]
        if jobs:
            self.fairness.serve(jobs, budget_tokens=turn.budget_tokens)
        for owner, count in turn.num_taken.items():
            self._take_front(owner, count)
        self._running.update((job.future_id, job) for job in jobs)
        return jobs

    def take_first(self, owner: OwnerId) -> Job:
        """The owner's first job, without a change of turn."""
        queue = self._queues[owner]
        job = queue.popleft()
        if not queue:
            del self._queues[owner]
        self._note_front(job)
        return job

    def settle(self, jobs: Sequence[Job]) -> str:
        """Forget these jobs, whose outcomes are about to be committed; the cursor to commit with them."""
        for job in jobs:
            del self._unsettled[self._entry_of.pop(job.future_id)]
            self.starts.pop(job.future_id, None)
            self._running.pop(job.future_id, None)
        return self.cursor

    def _take_front(self, owner: OwnerId, count: int) -> None:
        queue = self._queues.pop(owner)
        head = queue[0]
        for _ in range(count):
            queue.popleft()
        if queue:
            self._queues[owner] = queue
        self._note_front(head)

    def _note_front(self, taken: Job) -> None:
        """After this job was taken from the front of a queue: another one waits there, or none, or one of the other lane or tenant."""
        queue = self._queues.get(taken.owner)
        if queue is None or (lane_of(queue[0].op), queue[0].tenant) != (lane_of(taken.op), taken.tenant):
            self.fairness.leave(taken)
            if queue is not None:
                self.fairness.wait(queue[0])
