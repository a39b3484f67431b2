"""How long a batch waits for those who came along in the last one, by a clock that tests turn."""

from collections.abc import Mapping
from itertools import pairwise

import pytest
from tests.support.worker_jobs import job

from gradstream.shared.clock import ManualClock
from gradstream.shared.ids import ModelId, OwnerId
from gradstream.shared.wire import Job
from gradstream.worker.gathering import Gathering

BATCH_TOKENS = 1000
FB = "forward_backward"


class Arrivals:
    """Jobs that wait, and those that come: seconds after the wait began, and whose."""

    def __init__(self, clock: ManualClock, *waiting: Job, later: Mapping[float, str] | None = None) -> None:
        self.waiting: dict[OwnerId, list[Job]] = {one.owner: [one] for one in waiting}
        self._clock = clock
        self._start_s = clock.monotonic_s()
        self._later = sorted((later or {}).items())

    @property
    def waited_s(self) -> float:
        return self._clock.monotonic_s() - self._start_s

    def receive(self, timeout_s: float) -> None:
        if self._later and self._later[0][0] <= self.waited_s + timeout_s:
            at_s, owner = self._later.pop(0)
            self._clock.advance(at_s - self.waited_s)
            self.waiting[ModelId(owner)] = [job(owner, 1, FB, num_tokens=10)]
        else:
            self._clock.advance(timeout_s)


def small(owner: str, op: str = FB, *, num_tokens: int = 10) -> Job:
    return job(owner, 1, op, num_tokens=num_tokens)


def owners(*names: str) -> set[OwnerId]:
    return {ModelId(name) for name in names}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def gathering(clock: ManualClock) -> Gathering:
    """After a batch of a, b and c that took 25 ms."""
    made = Gathering(clock=clock, batch_tokens=BATCH_TOKENS)
    made.ran(FB, owners("a", "b", "c"), elapsed_s=0.025)
    return made


def test_a_wait_ends_when_everybody_is_there(gathering: Gathering, clock: ManualClock) -> None:
    arrivals = Arrivals(clock, small("b"), later={0.002: "a", 0.003: "c", 0.004: "d"})
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waiting.keys() == owners("a", "b", "c")
    assert arrivals.waited_s == pytest.approx(0.003)


def test_a_wait_ends_after_a_share_of_the_time_that_the_last_batch_took(
    gathering: Gathering, clock: ManualClock
) -> None:
    arrivals = Arrivals(clock, small("b"), later={0.002: "a", 0.015: "c"})
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waiting.keys() == owners("a", "b")
    assert arrivals.waited_s == pytest.approx(0.4 * 0.025)


def test_no_wait_is_long_after_a_long_batch(gathering: Gathering, clock: ManualClock) -> None:
    gathering.ran(FB, owners("a", "b"), elapsed_s=30.0)
    arrivals = Arrivals(clock, small("a"))
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waited_s == pytest.approx(0.02)


def test_an_owner_that_was_not_in_the_batch_waits_for_those_who_were(gathering: Gathering, clock: ManualClock) -> None:
    arrivals = Arrivals(clock, small("d"), later={0.001: "a", 0.002: "b", 0.003: "c"})
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waiting.keys() == owners("a", "b", "c", "d")


@pytest.mark.parametrize(
    "waiting",
    [
        pytest.param([], id="nothing waits"),
        pytest.param([small("a"), small("b"), small("c")], id="all are there"),
        pytest.param([small("a"), small("b", "optim_step")], id="something else can run"),
        pytest.param([small("a", "forward")], id="another op"),
        pytest.param([small("a", num_tokens=BATCH_TOKENS // 2)], id="half a batch is there"),
    ],
)
def test_nobody_is_waited_for_in_vain(gathering: Gathering, clock: ManualClock, waiting: list[Job]) -> None:
    arrivals = Arrivals(clock, *waiting, later={0.001: "c"})
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waited_s == 0.0


def test_all_jobs_of_who_waits_count_for_half_a_batch(gathering: Gathering, clock: ManualClock) -> None:
    arrivals = Arrivals(clock, small("a"))
    arrivals.waiting[ModelId("a")] = [job("a", seq, FB, num_tokens=BATCH_TOKENS // 4) for seq in (1, 2)]
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waited_s == 0.0


def test_jobs_behind_another_op_count_for_nothing(gathering: Gathering, clock: ManualClock) -> None:
    arrivals = Arrivals(clock, small("a"), later={0.001: "b", 0.002: "c"})
    arrivals.waiting[ModelId("a")] += [job("a", 2, "optim_step"), job("a", 3, FB, num_tokens=BATCH_TOKENS)]
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert len(arrivals.waiting) == 3


def test_nobody_is_waited_for_after_a_batch_of_one(gathering: Gathering, clock: ManualClock) -> None:
    gathering.ran(FB, owners("a"), elapsed_s=0.025)
    arrivals = Arrivals(clock, small("b"))
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert arrivals.waited_s == 0.0


def test_other_ops_in_between_change_nothing(gathering: Gathering, clock: ManualClock) -> None:
    gathering.ran("optim_step", owners("a"), elapsed_s=0.001)
    gathering.ran(FB, set(), elapsed_s=0.001)
    arrivals = Arrivals(clock, small("a"), later={0.001: "b", 0.002: "c"})
    gathering.wait(arrivals.waiting, receive=arrivals.receive)
    assert len(arrivals.waiting) == 3


def test_waits_in_vain_become_rare_and_one_that_pays_brings_them_back(gathering: Gathering, clock: ManualClock) -> None:
    def waits(later: Mapping[float, str]) -> bool:
        arrivals = Arrivals(clock, small("a"), later=later)
        gathering.wait(arrivals.waiting, receive=arrivals.receive)
        return arrivals.waited_s > 0

    in_vain = [number for number in range(400) if waits({})]
    assert in_vain[:6] == [0, 2, 5, 10, 19, 36]
    assert max(after - before for before, after in pairwise(in_vain)) == 65
    paid = next(number for number in range(100) if waits({0.001: "b"}))
    assert paid <= 65
    assert all(waits({0.001: "b", 0.002: "c"}) for _ in range(10))
