"""The loop of rank 0: read the log, plan, broadcast, execute, commit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import structlog

from gradstream.shared import codec
from gradstream.shared.clock import Clock
from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog.port import BatchId, Commit, Covered, Ended, Feed
from gradstream.shared.wire import Batch, Failed, Job, Outcome, Plan
from gradstream.worker.backlog import Backlog
from gradstream.worker.commit import Committer
from gradstream.worker.control import IDLE_TICK_S, Control
from gradstream.worker.execute import Executor, execute
from gradstream.worker.fence import StopRequest
from gradstream.worker.models import Models
from gradstream.worker.plan import Limits, Turn, next_turn
from gradstream.worker.reader import LogReader
from gradstream.worker.records import Executed, is_creator, record_writes, saved_uri
from gradstream.worker.storage import Storage
from gradstream.worker.storage_jobs import storage_outcome
from gradstream.worker.watchdog import Watchdog

# The kind of a plan whose jobs were answered without the engine.
REFUSED = "refused"
_MAX_REFUSED = 256

T = TypeVar("T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What the leader works with; each part is opened and closed by the caller. feed is used by the leader's thread only."""

    engine: Executor
    control: Control
    feed: Feed
    reader: LogReader
    committer: Committer
    backlog: Backlog
    models: Models
    storage: Storage
    watchdog: Watchdog
    clock: Clock


class Leader:
    """Runs batches of one epoch until asked to stop. Batch numbers start at 1."""

    def __init__(self, crew: Crew, *, epoch: int, limits: Limits, stop: StopRequest) -> None:
        self._crew = crew
        self._epoch = epoch
        self._limits = limits
        self._stop = stop
        self._number = 0

    def run(self) -> None:
        """Serve until asked to stop, then wait for the last commit. Whatever is not a job's own error propagates.

        Samples that run then are left to the next gang, which runs them again with the same random numbers.
        """
        backlog = self._crew.backlog
        while not self._stop.asked:
            self._take_in()
            self._answer_without_engine()
            turn = next_turn(
                backlog.waiting,
                limits=self._limits,
                last_lane=backlog.last_lane,
                last_led=backlog.last_led,
                suspects=backlog.starts.keys(),
                running=backlog.running.values(),
            )
            if turn is not None:
                self._run_turn(turn)
        self._crew.committer.flush(on_tick=self._crew.control.idle)
        if unfinished := list(backlog.running):
            self._patiently(lambda: self._crew.feed.mark_stopped(unfinished, epoch=self._epoch))
            _log.info("samples_left_to_the_next_gang", num_jobs=len(unfinished))

    def _take_in(self) -> None:
        crew = self._crew
        timeout_s = 0.0 if crew.backlog.waiting or crew.backlog.running else IDLE_TICK_S
        entries = crew.reader.get(timeout_s=timeout_s)
        for entry in entries:
            crew.backlog.add(entry)
        closed_bytes = sum(len(entry.job.payload) for entry in entries if not entry.is_open)
        crew.reader.release(closed_bytes)
        if timeout_s and not entries:
            crew.control.idle()

    def _answer_without_engine(self) -> None:
        """Commit the outcomes of jobs at the front of their queues that the engine does not or cannot serve."""
        crew = self._crew
        answered: list[Executed] = []
        for owner in list(crew.backlog.waiting):
            while len(answered) < _MAX_REFUSED and (jobs := crew.backlog.waiting.get(owner)):
                outcome = storage_outcome(jobs[0], crew.storage) or crew.models.answer(
                    jobs[0], starts=crew.backlog.starts.get(jobs[0].future_id, 0)
                )
                if outcome is None:
                    break
                job = crew.backlog.take_first(owner)
                answered.append(self._executed(job, outcome))
        if answered:
            future_ids = [executed.job.future_id for executed in answered]
            self._number += 1
            self._commit(answered, Plan(kind=REFUSED, future_ids=future_ids, row_budget_tokens=0))
            _log.info("jobs_answered_without_engine", num_jobs=len(answered), number=self._number)

    def _run_turn(self, turn: Turn) -> None:
        crew = self._crew
        start_s = crew.clock.monotonic_s()
        jobs = self._started(crew.backlog.take(turn))
        if not crew.backlog.running:
            return
        plan = msgspec.structs.replace(turn.plan, future_ids=[job.future_id for job in jobs])
        self._number += 1
        batch = Batch(number=self._number, epoch=self._epoch, plan=plan, jobs=jobs)
        with crew.watchdog.watch(plan.kind):
            crew.control.run(batch)
            outcomes = execute(crew.engine, batch)
        ended = [job for job in crew.backlog.running.values() if job.future_id in outcomes]
        assert len(ended) == len(outcomes), "an outcome is of no job that runs"
        if ended:
            journaled = Plan(
                kind=plan.kind,
                future_ids=[job.future_id for job in ended],
                row_budget_tokens=plan.row_budget_tokens,
            )
            self._commit([self._executed(job, outcomes[job.future_id]) for job in ended], journaled)
        log = _log.info if jobs or ended else _log.debug
        log(
            "batch",
            kind=plan.kind,
            number=batch.number,
            num_jobs=len(jobs),
            num_ended=len(ended),
            num_running=len(crew.backlog.running),
            num_failed=sum(isinstance(outcome, Failed) for outcome in outcomes.values()),
            num_tokens=sum(job.num_tokens for job in jobs),
            elapsed_ms=round(1000 * (crew.clock.monotonic_s() - start_s), 1),
        )

    def _executed(self, job: Job, outcome: Outcome) -> Executed:
        self._crew.models.learn(job, outcome)
        uri = saved_uri(outcome)
        return Executed(job=job, outcome=outcome, manifest=None if uri is None else self._crew.storage.manifest(uri))

    def _started(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are to run: all but samples that were cancelled since they were read.

        Counts a start of those that a later gang would run again; jobs of living models die with this one.
        """
        again = [job.future_id for job in jobs if job.op == "sample" or is_creator(job)]
        closed = set(self._patiently(lambda: self._crew.feed.mark_started(again, epoch=self._epoch)) if again else ())
        gone = [job for job in jobs if job.future_id in closed]
        self._crew.backlog.settle(gone)
        self._crew.reader.release(sum(len(job.payload) for job in gone))
        return [job for job in jobs if job.future_id not in closed]

    def _commit(self, executed: Sequence[Executed], plan: Plan) -> None:
        crew = self._crew
        cursor = crew.backlog.settle([one.job for one in executed])
        commit = Commit(
            epoch=self._epoch,
            number=self._number,
            outcomes=[Ended.of(one.job, one.outcome) for one in executed],
            plan=codec.encode(plan),
            cursor=cursor,
            records=[write for one in executed for write in record_writes(one)],
            covered=Covered(batch=BatchId(self._epoch, self._number), entry_id=cursor),
        )
        crew.committer.put(commit, on_tick=crew.control.idle)
        crew.reader.release(sum(len(one.job.payload) for one in executed))

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call an idempotent operation until Redis answers, keeping the followers' wait alive."""
        while True:
            try:
                return call()
            except Unavailable as error:
                _log.warning("redis_unreachable", reason=error.message)
                self._crew.control.idle()
