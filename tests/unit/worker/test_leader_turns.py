"""The leader tells the lanes how long each turn took, and waits for companions when nothing else can be done."""

from collections.abc import Sequence
from types import SimpleNamespace

from tests.support.worker_jobs import entry, job

from gradstream.shared.clock import ManualClock
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import Job, Plan
from gradstream.worker.backlog import Backlog
from gradstream.worker.fairness import Lane
from gradstream.worker.fence import StopRequest
from gradstream.worker.leader import Leader
from gradstream.worker.plan import Limits, next_turn

LIMITS = Limits(batch_tokens=100, batch_jobs=1, row_budget_tokens=50)


class Timed(Leader):
    """Batches of training take 0.5 s and slices 0.125 s, and do nothing; samples never end."""

    def __init__(self, backlog: Backlog, clock: ManualClock) -> None:
        super().__init__(
            SimpleNamespace(backlog=backlog, clock=clock),  # type: ignore[arg-type]  what a turn uses of a crew
            epoch=1,
            limits=LIMITS,
            stop=StopRequest(),
        )
        self._backlog, self._clock = backlog, clock

    def _started(self, jobs: Sequence[Job]) -> list[Job]:
        return list(jobs)

    def _run(self, jobs: list[Job], plan: Plan, *, start_s: float) -> None:
        del start_s
        self._clock.advance(0.125 if plan.kind == "sample" else 0.5)
        if plan.kind != "sample":
            self._backlog.settle(jobs)

    def turn(self) -> Lane:
        backlog = self._backlog
        turn = next_turn(
            backlog.waiting,
            limits=LIMITS,
            lanes=backlog.lanes,
            fairness=backlog.fairness,
            running=backlog.running.values(),
        )
        assert turn is not None
        self._run_turn(turn)
        return turn.lane


def test_four_slices_run_for_a_batch_that_takes_four_times_as_long():
    backlog, clock = Backlog(cursor="0-0"), ManualClock()
    backlog.add(entry(1, job("s", 1, "sample", num_tokens=1)))
    for seq in range(1, 20):
        backlog.add(entry(1 + seq, job("m", seq, "optim_step")))
    leader = Timed(backlog, clock)
    lanes = [leader.turn() for _ in range(50)]
    assert lanes.count(Lane.SAMPLE) == 4 * lanes.count(Lane.TRAIN)


class Waiting(Leader):
    """A leader whose last batch was of two owners, one of which is there again; every wait for the other one is noted."""

    def __init__(self, backlog: Backlog) -> None:
        clock = ManualClock()
        super().__init__(
            SimpleNamespace(backlog=backlog, clock=clock),  # type: ignore[arg-type]  what gathering uses of a crew
            epoch=1,
            limits=LIMITS,
            stop=StopRequest(),
        )
        self._clock = clock
        self.num_waits = 0
        self._gathering.ran("forward_backward", {ModelId("a"), ModelId("b")}, elapsed_s=0.01)

    def _receive(self, timeout_s: float) -> bool:
        self.num_waits += 1
        self._clock.advance(timeout_s)
        return False


def test_a_batch_of_training_waits_for_companions_of_its_jobs():
    backlog = Backlog(cursor="0-0")
    backlog.add(entry(1, job("a", 1, "forward_backward", num_tokens=1)))
    leader = Waiting(backlog)
    leader._gather()
    assert leader.num_waits == 1


def test_nobody_is_waited_for_while_samples_run():
    backlog = Backlog(cursor="0-0")
    backlog.add(entry(1, job("s", 1, "sample", num_tokens=1)))
    turn = next_turn(backlog.waiting, limits=LIMITS)
    assert turn is not None
    backlog.take(turn)
    backlog.add(entry(2, job("a", 1, "forward_backward", num_tokens=1)))
    leader = Waiting(backlog)
    leader._gather()
    assert leader.num_waits == 0


def test_nobody_is_waited_for_while_a_job_may_kill_the_gang():
    backlog = Backlog(cursor="0-0")
    backlog.add(entry(1, job("a", 1, "forward_backward", num_tokens=1), starts=1))
    leader = Waiting(backlog)
    leader._gather()
    assert leader.num_waits == 0
