"""Rank 0 from taking the lease to giving it back: builds the leader's crew, runs it, closes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from gradstream.shared.catalog import EngineCard
from gradstream.shared.clock import Clock
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import Feed, RecordKind
from gradstream.worker.backlog import Backlog
from gradstream.worker.commit import Committer
from gradstream.worker.control import Control
from gradstream.worker.execute import Executor
from gradstream.worker.fence import LeaseKeeper, StopRequest, acquire
from gradstream.worker.leader import Crew, Leader
from gradstream.worker.models import Models
from gradstream.worker.plan import Limits
from gradstream.worker.reader import LogReader
from gradstream.worker.storage import Storage
from gradstream.worker.watchdog import Watchdog

_log = structlog.get_logger(__name__)


class ServedEngine(Executor, Protocol):
    """The engine as rank 0 sees it."""

    def card(self, *, epoch: int) -> EngineCard:
        """What clients may ask of the engine."""
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
    max_models_per_tenant: int = 256
    storage_limit_bytes: int | None = None
    acquire_timeout_s: float = 120.0
    operation_timeout_s: float = 1800.0


def lead(
    engine: ServedEngine, control: Control, feed: Feed, *, options: LeadOptions, clock: Clock, stop: StopRequest
) -> None:
    """Serve the job log until asked to stop, then tell the followers and give the lease back.

    feed is used from several threads, each call on a connection of its own. Raises Fenced, Unavailable (the lease stayed with
    another owner) and whatever breaks the engine.
    """
    epoch = acquire(feed, owner=options.owner, clock=clock, timeout_s=options.acquire_timeout_s, stop=stop)
    if epoch is None:
        control.stop()
        return
    keeper = LeaseKeeper(feed, epoch=epoch)
    keeper.start()
    lost = feed.adopt([], lost={}, epoch=epoch).lost
    feed.publish_card(engine.card(epoch=epoch), epoch=epoch)
    _log.info("leading", epoch=epoch, owner=options.owner, num_ranks=control.num_ranks, num_lost_models=len(lost))

    def last_checkpoint(model: ModelId) -> str | None:
        return (feed.record(RecordKind.MODEL, model) or {}).get("last_checkpoint")

    cursor = feed.cursor()
    crew = Crew(
        engine=engine,
        control=control,
        feed=feed,
        reader=LogReader(feed, cursor=cursor, max_bytes=options.read_ahead_bytes),
        committer=Committer(feed),
        backlog=Backlog(cursor=cursor),
        models=Models(lost=lost, last_checkpoint=last_checkpoint, max_per_tenant=options.max_models_per_tenant),
        storage=Storage(options.output_dir, limit_bytes=options.storage_limit_bytes),
        watchdog=Watchdog(timeout_s=options.operation_timeout_s, clock=clock),
        clock=clock,
    )
    crew.watchdog.start()
    crew.reader.start()
    crew.committer.start()
    Leader(crew, epoch=epoch, limits=options.limits, stop=stop).run()
    control.stop()
    crew.reader.close()
    crew.committer.close()
    crew.watchdog.close()
    keeper.close()
    feed.release(epoch)
    _log.info("stopped", epoch=epoch)
