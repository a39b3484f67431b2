"""The samples that are running: admitted once, continued in slices, each on the rank that took it."""

from collections import deque
from dataclasses import dataclass, field, replace

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.memory import lack_of_room, no_room
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.pieces import joined, pieces_of
from gradstream.engine.sampler.request import Finished, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine, SamplerLimits
from gradstream.shared.errors import OutOfMemory
from gradstream.shared.ids import FutureId
from gradstream.shared.targets import PromptTargets

# What a lack of room is said to fail.
WHAT = "sample"
_SMALLER = (
    "ask for a shorter prompt, fewer tokens or fewer candidates, or start the server with a smaller max_active_adapters"
)


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


@dataclass(slots=True, kw_only=True)
class Slice:
    """By how many tokens the samples are still to be continued (None: to their end), and those of this rank that ended."""

    num_left: int | None
    ended: list[tuple[Admitted, Finished]] = field(default_factory=list)


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

    def holds(self, adapter: LoraWeights) -> bool:
        """True when a sample that runs, on any rank, uses it."""
        return any(one.request.adapter is adapter for one in self._running.values())

    def run(self, part: Slice) -> None:
        """Continue this rank's share by what is left of a slice. Nothing collective.

        Raises what torch raises when the device has no room, with nothing lost: it may be called again with the same slice.
        """
        while self._engine.has_work() and part.num_left != 0:
            for finished in self._engine.step():
                self._answer(finished, part)
            if part.num_left is not None:
                part.num_left -= 1

    def run_in_little_room(self, part: Slice) -> None:
        """The same, with fewer samples at a time where there is no room for all; OutOfMemory fails those that have none even alone."""
        while True:
            try:
                return self.run(part)
            except (RuntimeError, MemoryError) as error:
                reason = lack_of_room(error, what=WHAT)
            # After the block above, in which the failed step's tensors are still held.
            self._engine.give_way(no_room(what=WHAT, reason=reason, help_=_SMALLER))

    def _answer(self, finished: Finished, part: Slice) -> None:
        work = self._share.pop(id(finished.request))
        num_samples = finished.request.num_samples
        if isinstance(finished.error, OutOfMemory) and num_samples > 1:
            halves = pieces_of(finished.request, replace(self._engine.limits, max_rows=-(-num_samples // 2)))
            work.pieces.extendleft(reversed(halves))
            self._start(work)
            return
        work.answers.append(finished)
        if work.pieces and finished.error is None:
            self._start(work)
        else:
            part.ended.append((work.admitted, joined(work.admitted.request, work.answers)))

    def settle(self, future_id: FutureId) -> None:
        """Forget a request that ended on its rank."""
        del self._running[future_id]

    def _start(self, work: _Work) -> None:
        """Queue the next piece, behind the requests that came meanwhile."""
        piece = work.pieces.popleft()
        self._share[id(piece)] = work
        self._engine.add(piece)
