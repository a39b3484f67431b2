"""The samples that are running: admitted once, continued in slices, each on the rank that took it."""

from collections import deque
from dataclasses import dataclass, field

from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.pieces import joined, pieces_of
from gradstream.engine.sampler.request import Finished, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine, SamplerLimits
from gradstream.shared.ids import FutureId
from gradstream.shared.targets import PromptTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A request that runs. targets: the table that its job sent, if any. rank: where it runs, from its start to its end."""

    future_id: FutureId
    request: SampleRequest
    targets: PromptTargets | None
    rank: int

    @property
    def cost(self) -> int:
        """Tokens that it may need at most."""
        return len(self.request.prompt) + self.request.num_samples * self.request.max_tokens


@dataclass(slots=True, kw_only=True)
class _Work:
    """A request of this rank's share: the pieces that have not started, and the answers to those that ended."""

    admitted: Admitted
    pieces: deque[SampleRequest]
    answers: list[Finished] = field(default_factory=list)


class Decoding:
    """Which samples run where. The same on every rank, but for the sequences themselves: a rank has those of its own share.

    Every rank makes the same calls in the same order, with the same requests.
    """

    def __init__(self, *, base: BaseModel, rank: int, num_ranks: int, limits: SamplerLimits | None = None) -> None:
        self._rank = rank
        self._num_ranks = num_ranks
        self._engine = SamplerEngine(base=base, limits=limits or SamplerLimits())
        self._running: dict[FutureId, Admitted] = {}
        # By the identity of the piece that the engine has.
        self._share: dict[int, _Work] = {}

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, future_id: FutureId, request: SampleRequest, *, targets: PromptTargets | None) -> None:
        """Take a request to the rank with the least to do; it starts there as soon as the cache has room."""
        assert future_id not in self._running, f"{future_id} runs already"
        loads = [0] * self._num_ranks
        for other in self._running.values():
            loads[other.rank] += other.cost
        rank = loads.index(min(loads))
        admitted = Admitted(future_id=future_id, request=request, targets=targets, rank=rank)
        self._running[future_id] = admitted
        if rank == self._rank:
            self._start(_Work(admitted=admitted, pieces=deque(pieces_of(request, self._engine.limits))))

    def run(self, *, num_steps: int) -> list[tuple[Admitted, Finished]]:
        """Continue this rank's share by at most num_steps tokens (0: to the end); those that ended. Nothing collective."""
        ended: list[tuple[Admitted, Finished]] = []
        steps = 0
        while self._engine.has_work() and (steps < num_steps or not num_steps):
            for finished in self._engine.step():
                work = self._share.pop(id(finished.request))
                work.answers.append(finished)
                if work.pieces and finished.error is None:
                    self._start(work)
                else:
                    ended.append((work.admitted, joined(work.admitted.request, work.answers)))
            steps += 1
        return ended

    def settle(self, future_id: FutureId) -> None:
        """Forget a request that ended on its rank."""
        del self._running[future_id]

    def _start(self, work: _Work) -> None:
        """Queue the next piece, behind the requests that came meanwhile."""
        piece = work.pieces.popleft()
        self._share[id(piece)] = work
        self._engine.add(piece)
