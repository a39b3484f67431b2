"""The loop of rank 0: read the log, plan, broadcast, execute, commit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import msgspec
import structlog

from gradstream.shared import codec
from gradstream.shared.clock import Clock
from gradstream.shared.errors import GradstreamError, Unavailable
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.joblog.port import BatchId, Commit, Ended, Feed, RecordKind, RecordWrite
from gradstream.shared.wire import Batch, Failed, Job, LoadWeightsDone, Outcome, Plan
from gradstream.worker.backlog import Backlog
from gradstream.worker.commit import Committer
from gradstream.worker.control import IDLE_TICK_S, Control
from gradstream.worker.dead import DeadLetters
from gradstream.worker.execute import Executor, execute, lacked_room_together
from gradstream.worker.fence import StopRequest
from gradstream.worker.gathering import Gathering
from gradstream.worker.journal import Journal
from gradstream.worker.models import Models
from gradstream.worker.orphans import free_names
from gradstream.worker.plan import Limits, Turn, next_turn
from gradstream.worker.reader import LogReader
from gradstream.worker.records import Executed, is_creator, record_context, record_writes, saved_uri
from gradstream.worker.recovery.replay import STATEFUL
from gradstream.worker.running import RunningNote
from gradstream.worker.snapshots import Snapshots
from gradstream.worker.storage import Storage
from gradstream.worker.storage_jobs import STORAGE_OPS, storage_outcome
from gradstream.worker.watchdog import Watchdog

# The kind of a plan whose jobs were answered without the engine.
REFUSED = "refused"
_MAX_REFUSED = 256

T = TypeVar("T")
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """What the leader works with; each part is opened and closed by the caller."""

    engine: Executor
    control: Control
    feed: Feed
    reader: LogReader
    committer: Committer
    backlog: Backlog
    models: Models
    dead: DeadLetters
    storage: Storage
    journal: Journal
    snapshots: Snapshots
    running: RunningNote
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
        self._last: BatchId | None = None
        self._gathering = Gathering(clock=crew.clock, batch_tokens=limits.batch_tokens)

    def run(self) -> None:
        """Serve until asked to stop, then wait for the last commit. Whatever is not a job's own error propagates.

        Samples that run then are left to the next gang, which runs them again with the same random numbers.
        """
        backlog = self._crew.backlog
        self._last = self._patiently(self._crew.feed.last_batch)
        while not self._stop.asked:
            self._take_in()
            self._gather()
            self._answer_without_engine()
            turn = next_turn(
                backlog.waiting,
                limits=self._limits,
                lanes=backlog.lanes,
                fairness=backlog.fairness,
                suspects=backlog.starts.keys(),
                running=backlog.running.values(),
            )
            if turn is not None:
                self._run_turn(turn)
            self._snapshot_if_due()
        self._stop_in_order()

    def _stop_in_order(self) -> None:
        crew = self._crew
        crew.committer.flush(on_tick=crew.control.idle)
        crew.snapshots.finish(crew.models.live, on_tick=crew.control.idle)
        if unfinished := list(crew.backlog.running):
            crew.journal.stopped(unfinished)
            self._patiently(lambda: crew.feed.mark_stopped(unfinished, epoch=self._epoch))
            _log.info("samples_left_to_the_next_gang", num_jobs=len(unfinished))

    def _snapshot_if_due(self) -> None:
        crew = self._crew
        if crew.snapshots.is_due():
            crew.snapshots.take(crew.models.live)

    def _take_in(self) -> None:
        crew = self._crew
        timeout_s = 0.0 if crew.backlog.waiting or crew.backlog.running else IDLE_TICK_S
        if not self._receive(timeout_s) and timeout_s:
            crew.control.idle()

    def _receive(self, timeout_s: float) -> bool:
        """Put what was read into the backlog; True when anything was. Waits so long for the first of it."""
        crew = self._crew
        entries = crew.reader.get(timeout_s=timeout_s)
        for entry in entries:
            crew.backlog.add(entry)
        closed_bytes = sum(len(entry.job.payload) for entry in entries if not entry.is_open)
        crew.reader.release(closed_bytes)
        return bool(entries)

    def _gather(self) -> None:
        """Wait a moment for companions of the jobs that wait, unless samples run or a job may kill the gang."""
        backlog = self._crew.backlog
        if not backlog.running and not backlog.starts:
            self._gathering.wait(backlog.waiting, receive=self._receive)

    def _answer_without_engine(self) -> None:
        """Commit the outcomes of jobs at the front of their queues that the engine does not or cannot serve, until none is there."""
        while answered := list(islice(self._answered_without_engine(), _MAX_REFUSED)):
            future_ids = [executed.job.future_id for executed in answered]
            self._number += 1
            self._commit(answered, Plan(kind=REFUSED, future_ids=future_ids, row_budget_tokens=0))
            _log.info("jobs_answered_without_engine", num_jobs=len(answered), number=self._number)

    def _answered_without_engine(self) -> Iterator[Executed]:
        """These jobs, taken from their queues, each with its outcome; a suspect is the last of its commit."""
        crew = self._crew
        for owner in list(crew.backlog.waiting):
            while jobs := crew.backlog.waiting.get(owner):
                starts = crew.backlog.starts.get(jobs[0].future_id, 0)
                outcome = self._outcome_without_engine(jobs[0], starts=starts)
                if outcome is None:
                    break
                if crew.models.is_deadly(starts) and isinstance(outcome, Failed):
                    crew.dead.put(jobs[0], outcome, starts=starts, at_ms=crew.clock.wall_ms())
                yield self._executed(crew.backlog.take_first(owner), outcome)
                if starts:
                    return

    def _outcome_without_engine(self, job: Job, *, starts: int) -> Outcome | None:
        crew = self._crew
        if job.op in STORAGE_OPS and not crew.models.is_deadly(starts):
            crew.journal.started(self._number + 1, [job.future_id])
            with crew.watchdog.watch(job.op):
                outcome = storage_outcome(job, crew.storage)
            if outcome is not None:
                return outcome
        return crew.models.answer(job, starts=starts)

    def _run_turn(self, turn: Turn) -> None:
        crew = self._crew
        start_s = crew.clock.monotonic_s()
        jobs = self._started(crew.backlog.take(turn))
        if not crew.backlog.running:
            return
        self._run(jobs, msgspec.structs.replace(turn.plan, future_ids=[job.future_id for job in jobs]), start_s=start_s)
        crew.backlog.lanes.ran(crew.clock.monotonic_s() - start_s)

    def _run(self, jobs: list[Job], plan: Plan, *, start_s: float) -> None:
        """Run a batch, and commit what ended. Jobs that had no room together run one by one, as batches of their own."""
        crew = self._crew
        self._number += 1
        batch = Batch(number=self._number, epoch=self._epoch, plan=plan, jobs=jobs)
        outcomes = self._execute(batch)
        if lacked_room_together(batch, outcomes):
            self._run_one_by_one(batch)
            return
        elapsed_s = crew.clock.monotonic_s() - start_s
        self._gathering.ran(plan.kind, {job.owner for job in jobs}, elapsed_s=elapsed_s)
        ended = [job for job in crew.backlog.running.values() if job.future_id in outcomes]
        assert len(ended) == len(outcomes), "an outcome is of no job that runs"
        if ended:
            journaled = msgspec.structs.replace(plan, future_ids=[job.future_id for job in ended], num_steps=0)
            self._commit(
                [self._executed(job, outcomes[job.future_id]) for job in ended], journaled, elapsed_s=elapsed_s
            )
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
            elapsed_ms=round(1000 * elapsed_s, 1),
        )

    def _execute(self, batch: Batch) -> Mapping[FutureId, Outcome]:
        """Have every rank run a batch, of which the log on disk says before that it starts."""
        crew = self._crew
        if batch.jobs:
            free_names(batch.jobs, storage=crew.storage, recorded=self._recorded, settle=self._settle)
            crew.journal.started(batch.number, batch.plan.future_ids)
        crew.running.began(batch.number, batch.plan.kind, list(crew.backlog.running))
        with crew.watchdog.watch(batch.plan.kind):
            crew.control.run(batch)
            outcomes = execute(crew.engine, batch)
        crew.running.ended()
        return outcomes

    def _run_one_by_one(self, batch: Batch) -> None:
        """Run the jobs of the newest batch, which changed nothing and is not committed, as batches of their own from its number on.

        The mark that they started stays in the log: the first of these batches is marked with the same number, which only says again
        that its job runs. Readers count the epochs in which a job started, not the marks.
        """
        self._number -= 1
        _log.warning("batch_split", kind=batch.plan.kind, num_jobs=len(batch.jobs), reason="out of memory")
        for job in batch.jobs:
            alone = msgspec.structs.replace(batch.plan, future_ids=[job.future_id])
            self._run([job], alone, start_s=self._crew.clock.monotonic_s())

    def _recorded(self, kind: RecordKind, name: str) -> dict[str, str] | None:
        return self._patiently(lambda: self._crew.feed.record(kind, name))

    def _settle(self) -> None:
        """Return when everything so far is committed; raises Fenced when another gang leads."""
        self._crew.committer.flush(on_tick=self._crew.control.idle)
        self._patiently(lambda: self._crew.feed.renew(self._epoch))

    def _executed(self, job: Job, outcome: Outcome) -> Executed:
        self._crew.models.learn(job, outcome)
        storage = self._crew.storage
        if isinstance(outcome, LoadWeightsDone):
            return Executed(job=job, outcome=outcome, source=storage.source(outcome.path))
        if (uri := saved_uri(outcome)) is None:
            return Executed(job=job, outcome=outcome)
        try:
            return Executed(job=job, outcome=outcome, manifest=storage.manifest(uri))
        except GradstreamError as error:
            # Somebody deleted it meanwhile; saving changes no training state, so the job may fail after all.
            return Executed(job=job, outcome=Failed.of(error))

    def _started(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs that are to run: all but samples that were cancelled since they were read.

        Redis is told of samples, which can be cancelled until then.
        """
        again = [job.future_id for job in jobs if job.op == "sample"]
        closed = set(self._patiently(lambda: self._crew.feed.mark_started(again, epoch=self._epoch)) if again else ())
        gone = [job for job in jobs if job.future_id in closed]
        if gone:
            self._crew.journal.dropped([job.future_id for job in gone])
        self._crew.backlog.settle(gone)
        self._crew.reader.release(sum(len(job.payload) for job in gone))
        return [job for job in jobs if job.future_id not in closed]

    def _commit(self, executed: Sequence[Executed], plan: Plan, *, elapsed_s: float = 0.0) -> None:
        crew = self._crew
        changed = [ModelId(one.job.owner) for one in executed] if plan.kind in STATEFUL else []
        has_suspect = any(one.job.future_id in crew.backlog.starts for one in executed)
        cursor = crew.backlog.settle([one.job for one in executed])
        crew.snapshots.ran(BatchId(self._epoch, self._number), changed, cursor=cursor, elapsed_s=elapsed_s)
        sources = {one.job.future_id: one.source for one in executed if one.source is not None}
        if sources:
            # What was loaded may be overwritten or deleted; a replay need not load it again.
            crew.snapshots.take_now(crew.models.live, on_tick=crew.control.idle)
        commit = Commit(
            epoch=self._epoch,
            number=self._number,
            outcomes=[Ended.of(one.job, one.outcome) for one in executed],
            plan=codec.encode(plan),
            cursor=cursor,
            records=[write for one in executed for write in record_writes(one)],
            context=[write for one in executed for write in self._context(one)],
            covered=crew.snapshots.covered,
            sources=sources,
            at_ms=crew.clock.wall_ms(),
            elapsed_ms=round(1000 * elapsed_s, 3),
            after=self._last,
        )
        self._last = BatchId(self._epoch, self._number)
        crew.committer.put(commit, on_tick=crew.control.idle)
        if has_suspect:
            # The next job may be the one that kills: it must not convict this one, whose outcome nobody had seen.
            crew.committer.flush(on_tick=crew.control.idle)
        crew.reader.release(sum(len(one.job.payload) for one in executed))

    def _context(self, executed: Executed) -> list[RecordWrite]:
        """The records that the API wrote when a model was asked for, which only the log on disk could give back to a lost Redis."""
        if not is_creator(executed.job):
            return []
        feed = self._crew.feed
        model = self._patiently(lambda: feed.record(RecordKind.MODEL, executed.job.owner)) or {}
        session_id = model.get("session")
        session = self._patiently(lambda: feed.record(RecordKind.SESSION, session_id)) if session_id else None
        return record_context(executed.job, model, session)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call an idempotent operation until Redis answers, keeping the followers' wait alive."""
        while True:
            try:
                return call()
            except Unavailable as error:
                _log.warning("redis_unreachable", reason=error.message)
                self._crew.control.idle()
