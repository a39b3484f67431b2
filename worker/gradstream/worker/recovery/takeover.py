"""A new gang takes over: it agrees with Redis on what was done, and brings the models back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import structlog

from gradstream.engine.snapshot.cut import Cut
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared import codec
from gradstream.shared.clock import Clock
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, OwnerId, TenantId
from gradstream.shared.joblog.port import BatchId, Commit, Feed, FutureStatus, RecordWrite
from gradstream.shared.wire import (
    Batch,
    Failed,
    Job,
    LoadWeightsDone,
    Outcome,
    Payload,
    Plan,
    RestoreSnapshot,
    UnloadModel,
)
from gradstream.worker.disklog.frames import LoggedBatch
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.recovery.attempts import Attempts
from gradstream.worker.recovery.compare import Compare, Mode
from gradstream.worker.recovery.past import Past, cuts_that_count, read
from gradstream.worker.recovery.replay import Divergence, PastBatch, replay
from gradstream.worker.storage import Storage

_INTERNAL = FutureId("take-over:0")
_NOBODY = ModelId("take-over")
_log = structlog.get_logger(__name__)


class Models(Protocol):
    """What a take-over needs to know of the engine."""

    def models(self) -> Mapping[ModelId, TenantId]:
        """The models in memory, and whose they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a take-over works with. run executes a batch on every rank."""

    feed: Feed
    log: DiskLog
    store: SnapshotStore
    storage: Storage
    engine: Models
    run: Callable[[Batch], Mapping[FutureId, Outcome]]
    clock: Clock
    attempts: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """What a new gang begins with.

    models: in memory, and whose they are. lost: every lost model on record. changed: models whose state is not that of the base cut.
    last: the newest batch of earlier epochs. cuts: those that count and were not found damaged, newest first. starts: by open job, in how
    many epochs it was running at the end.
    """

    models: Mapping[ModelId, TenantId]
    lost: Sequence[ModelId]
    changed: frozenset[ModelId] = frozenset()
    last: BatchId | None = None
    cuts: Sequence[Cut] = ()
    starts: Mapping[FutureId, int] = field(default_factory=dict)


def take_over(tools: Tools, *, epoch: int, mode: Mode, compare: Compare) -> TakeOver:
    """Commit what earlier gangs had logged and not committed, and restore their models.

    The end of the log must be fixed before. Raises LogDamaged, Fenced, Unavailable.
    """
    start_s = tools.clock.monotonic_s()
    cut, past = _restored(tools, epoch=epoch) if mode != "none" else (None, read(tools.log, None))
    num_made_up = _agree(tools.feed, past, epoch=epoch)
    todo: list[PastBatch] = []
    if why := _cannot_replay(tools.feed, past, cut):
        lost = dict.fromkeys(tools.engine.models(), why)
    elif mode == "none":
        lost = {}
    else:
        todo = past.after(None if cut is None else BatchId(*cut.id))
        lost = _lost(_replayed(tools, todo, compare=compare, epoch=epoch))
    _forget(tools, lost, epoch=epoch)
    adoption = tools.feed.adopt(sorted(tools.engine.models()), lost=lost, epoch=epoch)
    _forget(tools, adoption.needless, epoch=epoch)
    models = dict(tools.engine.models())
    _log.info(
        "took_over",
        epoch=epoch,
        snapshot=None if cut is None else cut.name,
        num_batches=len(todo),
        num_made_up=num_made_up,
        num_models=len(models),
        num_lost=len(adoption.lost),
        elapsed_ms=round(1000 * (tools.clock.monotonic_s() - start_s), 1),
    )
    return TakeOver(
        models=models,
        lost=adoption.lost,
        changed=frozenset(ModelId(owner) for owner in _touched(todo)) & models.keys(),
        last=past.last,
        cuts=[] if cut is None else [cut],
        starts={future_id: len(epochs) for future_id, epochs in past.starts.items() if future_id in past.open_jobs},
    )


def _restored(tools: Tools, *, epoch: int) -> tuple[Cut | None, Past]:
    """The newest snapshot that is whole, now in memory, with the log from there; without one the log from its beginning."""
    for cut, past in cuts_that_count(tools.log, tools.store):
        payload = RestoreSnapshot(
            directory=str(tools.store.directory), epoch=cut.head.epoch, number=cut.head.number, drop_others=True
        )
        outcome = _run_alone(tools, payload, owner=_NOBODY, tenant=LOCAL_TENANT, epoch=epoch)
        if isinstance(outcome, Failed):
            _log.error("snapshot_damaged", snapshot=cut.name, reason=outcome.message)
            continue
        tools.store.continue_from(cut)
        return cut, past
    return None, read(tools.log, None)


def _cannot_replay(feed: Feed, past: Past, cut: Cut | None) -> str | None:
    """Why the log on disk does not lead to the models' last state, None when it does."""
    if cut is None and not past.is_whole:
        return "no snapshot is whole, and the log on disk does not begin at the start"
    last = feed.last_batch()
    if last is not None and (past.last is None or last > past.last):
        return f"the log on disk ends at batch {past.last}, and batch {last} was committed"
    return None


def _agree(feed: Feed, past: Past, *, epoch: int) -> int:
    """Commit the logged batches that Redis lacks; how many."""
    last = feed.last_batch()
    missing = [frame for frame in past.frames if last is None or frame.batch_id > last]
    by_id = {batch.batch: batch for batch in past.batches}
    for frame in missing:
        feed.commit(_commit(frame, by_id[frame.batch_id], epoch=epoch))
    return len(missing)


def _commit(frame: LoggedBatch, past: PastBatch, *, epoch: int) -> Commit:
    return Commit(
        epoch=epoch,
        number=0,
        batch=frame.batch_id,
        outcomes=past.ended,
        plan=codec.encode(frame.plan),
        cursor=frame.cursor,
        records=[
            RecordWrite(kind=record.kind, record_id=record.record_id, fields=record.fields) for record in frame.records
        ],
    )


def _replayed(tools: Tools, batches: Sequence[PastBatch], *, compare: Compare, epoch: int) -> list[Divergence]:
    attempts = Attempts(tools.attempts)

    def refuse(past: PastBatch) -> str | None:
        return _changed_source(past, tools.storage) or attempts.begin(past.batch)

    found = replay(batches, tools.run, compare=compare, epoch=epoch, refuse=refuse)
    attempts.end()
    return found


def _changed_source(past: PastBatch, storage: Storage) -> str | None:
    """Why the checkpoint that a batch loaded cannot be loaded again, None when it is as it was."""
    for ended in past.ended:
        outcome = codec.decode_outcome(ended.data)
        if ended.status is not FutureStatus.DONE or not isinstance(outcome, LoadWeightsDone):
            continue
        if storage.source(outcome.path) != past.sources.get(ended.job.future_id):
            return f"checkpoint {outcome.path} was replaced or removed since it was loaded"
    return None


def _lost(found: Sequence[Divergence]) -> dict[ModelId, str]:
    """The models that did not come out as they were, with the first reason of each."""
    lost: dict[ModelId, str] = {}
    for divergence in found:
        model = ModelId(divergence.job.owner)
        if model not in lost:
            lost[model] = divergence.message
            _log.error("replay_diverged", model=model, reason=divergence.message)
    return lost


def _forget(tools: Tools, models: Sequence[ModelId] | Mapping[ModelId, str], *, epoch: int) -> None:
    """Drop models from the memory of every rank."""
    held = tools.engine.models()
    for model in models:
        if model in held:
            _run_alone(tools, UnloadModel(), owner=model, tenant=held[model], epoch=epoch)


def _touched(batches: Sequence[PastBatch]) -> set[OwnerId]:
    return {ended.job.owner for past in batches if past.is_stateful for ended in past.ended}


def _run_alone(tools: Tools, payload: Payload, *, owner: OwnerId, tenant: TenantId, epoch: int) -> Outcome:
    """Run a job that the gang gives itself; it is in no log."""
    job = Job(
        future_id=_INTERNAL,
        owner=owner,
        seq=0,
        op=codec.op_of(payload),
        tenant=tenant,
        payload=codec.encode(payload),
    )
    plan = Plan(kind=job.op, future_ids=[job.future_id], row_budget_tokens=1)
    return tools.run(Batch(number=0, epoch=epoch, plan=plan, jobs=[job]))[job.future_id]
