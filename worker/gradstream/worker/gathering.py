"""How long a batch of training waits for those who came along in the last one.

Tenants that train side by side hear of a batch together, and send their next jobs within moments of each other. The first of these would
run alone while the others are on their way, which takes as long as a good part of them all together, takes the cores from the processes
that bring the others, and makes those wait for its end.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, takewhile

from gradstream.shared.clock import Clock
from gradstream.shared.ids import OwnerId
from gradstream.shared.wire import Job

# Whose datums share rows: what more of them add to a small batch is far less than a batch of their own.
_GATHERED = frozenset({"forward_backward", "forward"})
# Of the time that the last batch took, and the most of all.
_SHARE, _MOST_S = 0.4, 0.02
# After waits in vain so many chances are let pass, twice as many after each.
_MOST_PASSED = 64


class Gathering:
    """Remembers the last batch of jobs whose datums share rows.

    A wait ends when everybody of that batch is there, at the latest after 0.4 of the time that it took, and 20 ms. Nobody is waited for
    after a batch of one owner, while anything else could run, or once half a batch is there. A wait for which fewer than half of the
    missing came was in vain: then the next chances are let pass, twice as many each time.
    """

    def __init__(self, *, clock: Clock, batch_tokens: int) -> None:
        self._clock = clock
        self._enough_tokens = batch_tokens / 2
        self._kind = ""
        self._companions: frozenset[OwnerId] = frozenset()
        self._patience_s = 0.0
        self._num_to_pass = 0
        self._pass_next = 1

    def ran(self, kind: str, owners: Collection[OwnerId], *, elapsed_s: float) -> None:
        """A batch with jobs of these owners took this long."""
        if kind in _GATHERED and owners:
            self._kind, self._companions = kind, frozenset(owners)
            self._patience_s = min(_SHARE * elapsed_s, _MOST_S)

    def wait(self, waiting: Mapping[OwnerId, Sequence[Job]], *, receive: Callable[[float], object]) -> None:
        """Wait for companions if they are worth it. waiting: each owner's jobs in order. receive: adds what comes within so many seconds."""
        missing = self._missing(waiting)
        if not missing:
            return
        if self._num_to_pass:
            self._num_to_pass -= 1
            return
        deadline_s = self._clock.monotonic_s() + self._patience_s
        while self._missing(waiting) and (left_s := deadline_s - self._clock.monotonic_s()) > 0:
            receive(left_s)
        if 2 * len(missing & waiting.keys()) >= len(missing):
            self._pass_next = 1
        else:
            self._num_to_pass, self._pass_next = self._pass_next, min(2 * self._pass_next, _MOST_PASSED)

    def _missing(self, waiting: Mapping[OwnerId, Sequence[Job]]) -> frozenset[OwnerId]:
        """Whom the jobs that wait could wait for."""
        missing = self._companions - waiting.keys()
        if len(self._companions) < 2 or not missing or not waiting:
            return frozenset()
        if any(jobs[0].op != self._kind for jobs in waiting.values()):
            return frozenset()
        ready = (takewhile(lambda job: job.op == self._kind, jobs) for jobs in waiting.values())
        num_tokens = sum(job.num_tokens for job in chain.from_iterable(ready))
        return missing if num_tokens < self._enough_tokens else frozenset()
