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
    crew = _crew(engine, control, feed, ticking, watchdog, card=card, options=options, clock=clock, stop=stop)
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


def _crew(  # noqa: PLR0913 - what rank 0 has by then, each named
    engine: ServedEngine,
    control: Control,
    feed: Feed,
    ticking: Ticking,
    watchdog: Watchdog,
    *,
    card: EngineCard,
    options: LeadOptions,
    clock: Clock,
    stop: StopRequest,
) -> Crew | None:
    """The crew of an epoch that has taken over; None when asked to stop while the disk was full."""
    durability = options.durability
    log, store = DiskLog(durability.joblog), SnapshotStore(durability.snapshots)
    drafts = Drafts(options.output_dir, engine=durability.engine, epoch=card.epoch)
    tail = _tail_or_set_aside(log, store, clock=clock)

    def settle_in() -> Journal:
        # From here on an earlier gang that only stood still neither saves nor logs anything that counts.
        drafts.take()
        return _journal(tail, card, options=durability, clock=clock)

    journal = when_there_is_room(settle_in, is_over=lambda: stop.asked)
    if journal is None:
        return None
    engine.prepare_saves_in(drafts)

    def run(batch: Batch) -> Mapping[FutureId, Outcome]:
        with ticking.paused(), watchdog.watch(batch.plan.kind):
            control.run(batch)
            return execute(engine, batch)

    storage = Storage(options.output_dir, limit_bytes=options.storage_limit_bytes, drafts=drafts)
    tools = Tools(
        feed=feed,
        log=log,
        journal=journal,
        last=tail.last,
        store=store,
        storage=storage,
        engine=engine,
        run=run,
        clock=clock,
        attempts=durability.joblog / "replaying.json",
        fingerprint=card.fingerprint,
    )
    compare = tolerant(durability.tolerance) if durability.mode == "tolerant" else exact
    taken = take_over(tools, epoch=card.epoch, mode=durability.mode, compare=compare)
    committer = Committer(feed, log=journal.batch)
    cursor = feed.cursor()
    return Crew(
        engine=engine,
        control=control,
        feed=feed,
        reader=LogReader(feed, cursor=cursor, max_bytes=options.read_ahead_bytes, log=journal.log_read),
        committer=committer,
        backlog=Backlog(cursor=cursor, starts=taken.starts),
        models=_models(feed, taken, options),
        dead=DeadLetters(options.output_dir),
        storage=storage,
        journal=journal,
        snapshots=_snapshots(engine, tools, taken, journal, committer, card=card, options=durability),
        running=RunningNote(feed, epoch=card.epoch),
        watchdog=watchdog,
        clock=clock,
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


def _snapshots(  # noqa: PLR0913 - what snapshots touch, each named
    engine: ServedEngine,
    tools: Tools,
    taken: TakeOver,
    journal: Journal,
    committer: Committer,
    *,
    card: EngineCard,
    options: Durability,
) -> Snapshots:
    keeping = Keeping(
        feed=tools.feed,
        store=tools.store,
        committer=committer,
        journal=journal,
        epoch=card.epoch,
        durability=options,
        clock=tools.clock,
        cuts=sorted(taken.cuts, key=lambda cut: cut.id),
    )
    return Snapshots(
        engine=engine,
        store=tools.store,
        finish=keeping.finish,
        position=journal.scan_from,
        stamp=Stamp(engine=options.engine, fingerprint=card.fingerprint),
        cadence=None if options.mode == "none" else options.cadence,
        clock=tools.clock,
        changed=taken.changed,
        covered=keeping.covered,
    )
