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
from gradstream.shared.errors import GradstreamError
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, OwnerId, TenantId
from gradstream.shared.joblog.port import BatchId, Feed, FutureStatus, RecordKind
from gradstream.shared.wire import (
    Batch,
    Failed,
    LoadWeightsDone,
    Outcome,
    Payload,
    RestoreSnapshot,
    RestoreSnapshotDone,
    UnloadModel,
)
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.facts import changed_facts
from gradstream.worker.internal import internal_batch
from gradstream.worker.journal import Journal
from gradstream.worker.recovery.agree import catch_up, make_up
from gradstream.worker.recovery.attempts import Attempts
from gradstream.worker.recovery.compare import Compare, Mode
from gradstream.worker.recovery.kind import check_kind, check_meaning
from gradstream.worker.recovery.past import Keep, Past, cuts_that_count, keep_after, read
from gradstream.worker.recovery.replay import Divergence, PastBatch, replay
from gradstream.worker.storage import Storage

_INTERNAL = FutureId("take-over:0")
_UNKNOWN = "no snapshot and no batch of the log on disk holds it"
_NOBODY = ModelId("take-over")
_log = structlog.get_logger(__name__)


class Models(Protocol):
    """What a take-over needs to know of the engine."""

    def models(self) -> Mapping[ModelId, TenantId]:
        """The models in memory, and whose they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What a take-over works with. run executes a batch on every rank. last: the newest batch of the log on disk.

    fingerprint: of the engine.
    """

    feed: Feed
    log: DiskLog
    journal: Journal
    last: BatchId | None
    store: SnapshotStore
    storage: Storage
    engine: Models
    run: Callable[[Batch], Mapping[FutureId, Outcome]]
    clock: Clock
    attempts: Path
    fingerprint: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a take-over has before it replays anything.

    cut: the snapshot in memory, None without one. past: the log from there on, or all of it. misfits: the models of the snapshot that this
    engine cannot hold, with the reasons.
    """

    cut: Cut | None
    past: Past
    misfits: Mapping[ModelId, str] = field(default_factory=dict)


def take_over(tools: Tools, *, epoch: int, mode: Mode, compare: Compare) -> TakeOver:
    """Commit what earlier gangs had logged and not committed, and restore their models.

    The end of the log must be fixed before. Raises Unsupported for models that this engine could only lose, as it is of another base model
    or kind, or means other things by the jobs that it would have to run again; and Fenced, Unavailable, and what breaks the engine.
    """
    start_s = tools.clock.monotonic_s()
    behind = catch_up(tools.feed, tools.journal, last=tools.last, epoch=epoch)
    last = tools.feed.last_batch()
    if mode == "none":
        uncommitted = _whole(tools.log, keep=lambda frame: last is None or frame.batch_id > last)
        restored = Restored(cut=None, past=uncommitted)
    else:
        restored = _restored(tools, last=last, epoch=epoch)
    cut, past = restored.cut, restored.past
    num_made_up = make_up(tools.feed, tools.log, past, epoch=epoch, storage=tools.storage, journal=tools.journal)
    todo: list[PastBatch] = []
    why = "recovery is none" if mode == "none" else behind or _cannot_replay(tools, past, cut)
    if why is not None:
        lost = {**dict.fromkeys(tools.engine.models(), why), **restored.misfits}
    else:
        todo = past.after(None if cut is None else BatchId(*cut.id))
        check_meaning(todo, tools.fingerprint, state_of=lambda model: _state(tools.feed, model))
        lost = {**_lost(_replayed(tools, todo, compare=compare, epoch=epoch)), **restored.misfits}
    _forget(tools, lost, epoch=epoch)
    adoption = tools.feed.adopt(sorted(tools.engine.models()), lost=lost, otherwise=why or _UNKNOWN, epoch=epoch)
    _tell_lost({model: reason for model, reason in lost.items() if model in adoption.lost})
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


def _tell_lost(reasons: Mapping[ModelId, str]) -> None:
    """Say at once, once for all models, what their owners hear only when they come back."""
    if reasons:
        first = min(reasons)
        _log.warning("models_lost", num_models=len(reasons), first=first, reason=reasons[first])


def _restored(tools: Tools, *, last: BatchId | None, epoch: int) -> Restored:
    """The newest snapshot that is whole, now in memory, with the log from there; without one the log from its beginning."""
    for cut, past in cuts_that_count(tools.log, tools.store, last=last):
        check_kind(cut, past, tools.fingerprint, state_of=lambda model: _state(tools.feed, model))
        payload = RestoreSnapshot(
            directory=str(tools.store.directory), epoch=cut.head.epoch, number=cut.head.number, drop_others=True
        )
        outcome = _run_alone(tools, payload, owner=_NOBODY, tenant=LOCAL_TENANT, epoch=epoch)
        if isinstance(outcome, Failed):
            _log.error("snapshot_damaged", snapshot=cut.name, reason=outcome.message)
            continue
        assert isinstance(outcome, RestoreSnapshotDone)
        tools.store.continue_from(cut)
        return Restored(cut=cut, past=past, misfits=outcome.failed)
    return Restored(cut=None, past=_whole(tools.log, keep=keep_after(None, last=last)))


def _state(feed: Feed, model: OwnerId) -> str:
    return (feed.record(RecordKind.MODEL, model) or {}).get("state", "")


def _cannot_replay(tools: Tools, past: Past, cut: Cut | None) -> str | None:
    """Why the log on disk does not lead to the models' last state, None when it does."""
    if cut is None:
        if past.ids and not past.is_whole:
            return "no snapshot is whole, and the log on disk does not begin at the start"
        return None
    changed = changed_facts(cut.head.fingerprint, tools.fingerprint)
    if "model" in changed:
        return "the snapshot is of another base model: the weights in model_path have changed"
    if changed:
        _log.warning("engine_changed", facts=changed, snapshot=cut.name)
    return None


def _whole(log: DiskLog, *, keep: Keep) -> Past:
    """All of the log; an empty one when it is damaged."""
    try:
        return read(log, None, keep=keep)
    except LogDamaged as error:
        _log.error("joblog_damaged", reason=error.message)
        return Past(is_whole=False)


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
        recorded = past.sources.get(ended.job.future_id)
        is_same = (
            _is_older(storage, outcome.path, past.at_ms)
            if recorded is None
            else storage.source(outcome.path) == recorded
        )
        if not is_same:
            return f"checkpoint {outcome.path} was replaced or removed since it was loaded"
    return None


def _is_older(storage: Storage, uri: str, at_ms: int) -> bool:
    """True when a checkpoint lies there since before a time; what Redis gave back of a batch does not tell which one was loaded."""
    try:
        return storage.manifest(uri).created_ms <= at_ms
    except GradstreamError:
        return False


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
    batch = internal_batch(payload, future_id=_INTERNAL, owner=owner, tenant=tenant, epoch=epoch)
    return tools.run(batch)[_INTERNAL]
