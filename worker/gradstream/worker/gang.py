"""Rank 0 from taking the lease to giving it back: builds the leader's crew, runs it, closes it."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from gradstream.engine.checkpoint.drafts import Drafts, newest_drafts
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.catalog import EngineCard
from gradstream.shared.clock import Clock
from gradstream.shared.ids import FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import Feed, RecordKind
from gradstream.shared.wire import Batch, Outcome
from gradstream.worker.backlog import Backlog
from gradstream.worker.commit import Committer
from gradstream.worker.control import Control
from gradstream.worker.dead import DeadLetters
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.segments import newest_epoch
from gradstream.worker.disklog.tail import Tail
from gradstream.worker.disklog.writer import DiskLogWriter, Opening
from gradstream.worker.execute import Executor, execute
from gradstream.worker.fence import LeaseKeeper, StopRequest, acquire
from gradstream.worker.journal import Journal
from gradstream.worker.keeping import Durability, Keeping
from gradstream.worker.leader import Crew, Leader
from gradstream.worker.models import Models
from gradstream.worker.patience import when_there_is_room
from gradstream.worker.plan import Limits
from gradstream.worker.reader import LogReader
from gradstream.worker.recovery.compare import exact, tolerant
from gradstream.worker.recovery.past import tail_of
from gradstream.worker.recovery.takeover import TakeOver, Tools, take_over
from gradstream.worker.running import RunningNote
from gradstream.worker.snapshots import Snapshots, Stamp
from gradstream.worker.storage import Storage
from gradstream.worker.ticking import Ticking
from gradstream.worker.trimming import Trimmer
from gradstream.worker.watchdog import Watchdog

_log = structlog.get_logger(__name__)


class ServedEngine(Executor, Protocol):
    """The engine as rank 0 sees it."""

    def card(self, *, epoch: int) -> EngineCard:
        """What clients may ask of the engine."""
        ...

    def models(self) -> Mapping[ModelId, TenantId]:
        """The models in memory, and whose they are."""
        ...

    def capture(self, model_ids: Collection[ModelId]) -> list[ModelState]:
        """Copies of these models."""
        ...

    def prepare_saves_in(self, drafts: Drafts) -> None:
        """Prepare every save there from now on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadOptions:
    """owner names this launcher's gangs: the next gang of the same owner takes over at once, others wait for the lease to end.

    read_ahead_bytes bounds the payloads in memory; it must hold all that the queue accepts, or a busy owner's jobs could keep
    those of others from being read.
    """

    owner: str
    output_dir: Path
    limits: Limits
    read_ahead_bytes: int
    durability: Durability
    max_job_deaths: int = 2
    max_models_per_tenant: int = 256
    storage_limit_bytes: int | None = None
    acquire_timeout_s: float = 120.0
    operation_timeout_s: float = 1800.0


def lead(
    engine: ServedEngine, control: Control, feed: Feed, *, options: LeadOptions, clock: Clock, stop: StopRequest
) -> None:
    """Serve the job log until asked to stop, then tell the followers and give the lease back.

    feed is used from several threads, each call on a connection of its own. Raises Fenced or Revoked (another gang has taken over),
    Unavailable (the lease stayed with another owner), LogDamaged and whatever breaks the engine.
    """
    ticking = Ticking(control)
    ticking.start()
    epoch = acquire(
        feed,
        owner=options.owner,
        clock=clock,
        timeout_s=options.acquire_timeout_s,
        stop=stop,
        above=max(
            newest_epoch(options.durability.joblog),
            newest_drafts(options.output_dir, engine=options.durability.engine),
        ),
    )
    if epoch is None:
        ticking.finish()
        control.stop()
        return
    keeper = LeaseKeeper(feed, epoch=epoch)
    keeper.start()
    watchdog = Watchdog(timeout_s=options.operation_timeout_s, clock=clock)
    watchdog.start()
    card = engine.card(epoch=epoch)
    rank = _Rank(
        engine=engine,
        control=control,
        feed=feed,
        ticking=ticking,
        watchdog=watchdog,
        card=card,
        options=options,
        clock=clock,
        stop=stop,
    )
    crew = _crew(rank)
    ticking.finish()
    if crew is None:
        control.stop()
    else:
        feed.publish_card(card, epoch=epoch)
        _log.info("leading", epoch=epoch, owner=options.owner, num_ranks=control.num_ranks)
        _serve(crew, epoch=epoch, options=options, stop=stop)
    watchdog.close()
    keeper.close()
    feed.release(epoch)
    _log.info("stopped", epoch=epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """What rank 0 has when it holds the lease."""

    engine: ServedEngine
    control: Control
    feed: Feed
    ticking: Ticking
    watchdog: Watchdog
    card: EngineCard
    options: LeadOptions
    clock: Clock
    stop: StopRequest

    def run(self, batch: Batch) -> Mapping[FutureId, Outcome]:
        """Run a batch on every rank."""
        with self.ticking.paused(), self.watchdog.watch(batch.plan.kind):
            self.control.run(batch)
            return execute(self.engine, batch)


def _crew(rank: _Rank) -> Crew | None:
    """The crew of an epoch that has taken over; None when asked to stop while the disk was full."""
    options, durability = rank.options, rank.options.durability
    log, store = DiskLog(durability.joblog), SnapshotStore(durability.snapshots)
    drafts = Drafts(options.output_dir, engine=durability.engine, epoch=rank.card.epoch)
    tail = _tail_or_set_aside(log, store, clock=rank.clock)
    journal = _settled_in(rank, tail, drafts)
    if journal is None:
        return None
    rank.engine.prepare_saves_in(drafts)
    tools = Tools(
        feed=rank.feed,
        log=log,
        journal=journal,
        last=tail.last,
        store=store,
        storage=Storage(options.output_dir, limit_bytes=options.storage_limit_bytes, drafts=drafts),
        engine=rank.engine,
        run=rank.run,
        clock=rank.clock,
        attempts=durability.joblog / "replaying.json",
        fingerprint=rank.card.fingerprint,
    )
    compare = tolerant(durability.tolerance) if durability.mode == "tolerant" else exact
    taken = take_over(tools, epoch=rank.card.epoch, mode=durability.mode, compare=compare)
    return _crew_of(rank, tools, taken)


def _settled_in(rank: _Rank, tail: Tail, drafts: Drafts) -> Journal | None:
    """This epoch's part of the log on disk, as soon as there is room for it; None when asked to stop before."""

    def settle_in() -> Journal:
        # From here on an earlier gang that only stood still neither saves nor logs anything that counts.
        drafts.take()
        return _journal(tail, rank.card, options=rank.options.durability, clock=rank.clock)

    return when_there_is_room(settle_in, is_over=lambda: rank.stop.asked)


def _crew_of(rank: _Rank, tools: Tools, taken: TakeOver) -> Crew:
    """Everybody who serves from now on, from where the job log stands."""
    feed, journal, options = rank.feed, tools.journal, rank.options
    committer = Committer(feed, log=journal.batch)
    cursor = feed.cursor()
    return Crew(
        engine=rank.engine,
        control=rank.control,
        feed=feed,
        reader=LogReader(feed, cursor=cursor, max_bytes=options.read_ahead_bytes, log=journal.log_read),
        committer=committer,
        backlog=Backlog(cursor=cursor, starts=taken.starts),
        models=_models(feed, taken, options),
        dead=DeadLetters(options.output_dir),
        storage=tools.storage,
        journal=journal,
        snapshots=_snapshots(rank, tools, taken, committer),
        running=RunningNote(feed, epoch=rank.card.epoch),
        watchdog=rank.watchdog,
        clock=rank.clock,
    )


def _serve(crew: Crew, *, epoch: int, options: LeadOptions, stop: StopRequest) -> None:
    """From the first job to the last."""
    trimmer = None
    if options.durability.mode == "none":
        trimmer = Trimmer(crew.journal, crew.committer, durability=options.durability, clock=crew.clock)
        trimmer.start()
    crew.snapshots.start()
    crew.running.start()
    crew.reader.start()
    crew.committer.start()
    Leader(crew, epoch=epoch, limits=options.limits, stop=stop).run()
    crew.control.stop()
    crew.reader.close()
    crew.committer.close()
    crew.snapshots.close()
    crew.running.close()
    if trimmer is not None:
        trimmer.close()
    crew.journal.close()


def _tail_or_set_aside(log: DiskLog, store: SnapshotStore, *, clock: Clock) -> Tail:
    """The end of the log on disk. A damaged log is moved aside, and a new one begins with what Redis still has.

    Only for the holder of the lease.
    """
    try:
        return tail_of(log, store)
    except LogDamaged as error:
        aside = log.directory.with_name(f"{log.directory.name}.damaged-{clock.wall_ms()}")
        _log.error("joblog_damaged", reason=error.message, kept_as=str(aside))
        epoch = newest_epoch(log.directory)
        log.directory.rename(aside)
        return Tail(last=None, end=None, open_jobs={}, starts={}, epoch=epoch, last_entry=0, fingerprint=None)


def _journal(tail: Tail, card: EngineCard, *, options: Durability, clock: Clock) -> Journal:
    """This epoch's part of the log on disk. What an earlier gang writes from now on does not count."""
    opening = Opening(
        engine=options.engine,
        epoch=card.epoch,
        fingerprint=card.fingerprint,
        after=tail.end,
        known_open=tail.open_jobs.keys(),
    )
    writer = DiskLogWriter.open(
        options.joblog, opening, sync=options.sync, segment_bytes=options.segment_bytes, clock=clock
    )
    return Journal(writer, open_jobs={future: position for future, (position, _) in tail.open_jobs.items()})


def _models(feed: Feed, taken: TakeOver, options: LeadOptions) -> Models:
    def last_checkpoint(model: ModelId) -> str | None:
        return (feed.record(RecordKind.MODEL, model) or {}).get("last_checkpoint")

    return Models(
        lost=taken.lost,
        last_checkpoint=last_checkpoint,
        max_per_tenant=options.max_models_per_tenant,
        live=taken.models,
        max_deaths=options.max_job_deaths,
    )


def _snapshots(rank: _Rank, tools: Tools, taken: TakeOver, committer: Committer) -> Snapshots:
    durability = rank.options.durability
    keeping = Keeping(
        feed=tools.feed,
        store=tools.store,
        committer=committer,
        journal=tools.journal,
        epoch=rank.card.epoch,
        durability=durability,
        clock=tools.clock,
        cuts=sorted(taken.cuts, key=lambda cut: cut.id),
    )
    return Snapshots(
        engine=rank.engine,
        store=tools.store,
        finish=keeping.finish,
        position=tools.journal.scan_from,
        stamp=Stamp(engine=durability.engine, fingerprint=rank.card.fingerprint),
        cadence=None if durability.mode == "none" else durability.cadence,
        clock=tools.clock,
        changed=taken.changed,
        covered=keeping.covered,
    )
