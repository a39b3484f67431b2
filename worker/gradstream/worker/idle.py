"""Models that their clients named and then left: saved, then unloaded.

A sweep may be repeated at any point; how far one came stands in the model's record. Nothing is unloaded that is not saved, and nothing
that somebody used after it was saved. The model `default`, which clients use without making it, is saved and stays in memory: they would
go on with a fresh one without noticing.

kill_session of the API comes to the same end by another way: several calls at a time, each of which waits for its jobs, replaces one fixed
checkpoint and must say why a job failed. A sweep is alone, waits for nothing, and looks at the next one whether its checkpoint is there.
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import structlog

from gradstream.shared import codec
from gradstream.shared.activity import last_active_ms
from gradstream.shared.errors import GradstreamError, SequenceConflict, UnknownModel
from gradstream.shared.ids import DEFAULT_MODEL, ModelId, TenantId, future_parts
from gradstream.shared.joblog.port import RecordKind, Submission
from gradstream.shared.model_record import Dialect, ModelState, dialect_of, num_open_jobs
from gradstream.shared.wire import SaveWeights
from gradstream.worker.sweeps import Parts, unload_of

_FIELD = "idle"
_log = structlog.get_logger(__name__)


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep did with a model. next_seq: the model's, as long as nobody sent it another job. at_ms: wall time."""

    uri: str
    next_seq: int
    at_ms: int


async def sweep_idle(parts: Parts, *, idle_s: float, awake_ms: int) -> int:
    """Save models that were left idle_s ago, unload those that are saved; how many jobs were submitted for that.

    A model whose job the queue refuses is left to the next sweep, and does not keep the others waiting.

    Silence is counted from awake_ms on at the earliest: before it the server, or the whole machine, was not there to listen.
    """
    num_jobs = 0
    for model, record in list(parts.census.records(RecordKind.MODEL)):
        is_idle = record.get("state") == ModelState.READY and not num_open_jobs(record)
        if is_idle and dialect_of(record) is Dialect.XORL:
            limit_ms = parts.now_ms - int(1000 * idle_s)
            try:
                num_jobs += await _sweep(parts, ModelId(model), record, limit_ms=limit_ms, awake_ms=awake_ms)
            except GradstreamError as error:
                # That of one tenant, whose queue may be full; the next sweep comes back to it.
                _log.warning("idle_model_not_swept", model_id=model, code=error.code, reason=error.message)
    return num_jobs


async def _sweep(parts: Parts, model: ModelId, record: Mapping[str, str], *, limit_ms: int, awake_ms: int) -> bool:
    """True when a job was submitted. limit_ms: a model that was used after it is not idle."""
    next_seq = int(record.get("next_seq", "0"))
    saved = msgspec.json.decode(record[_FIELD], type=_Saved) if record.get(_FIELD) else None
    is_saved = (
        saved is not None
        and saved.next_seq == next_seq
        and await parts.intake.record(RecordKind.CHECKPOINT, saved.uri) is not None
    )
    if is_saved:
        assert saved is not None
        came_back = int(record.get("seen_ms", "0")) > max(saved.at_ms, limit_ms)
        return not came_back and await _unload(parts, model, record, next_seq=next_seq)
    if max(last_active_ms(record), awake_ms) > limit_ms:
        return False
    if next_seq <= 1:
        # Made, and never used: there is nothing to save.
        return await _unload(parts, model, record, next_seq=next_seq)
    return await _save(parts, model, record)


async def _save(parts: Parts, model: ModelId, record: Mapping[str, str]) -> bool:
    moment = datetime.fromtimestamp(parts.now_ms / 1000, tz=UTC)
    name = f"idle_{moment:%Y%m%d-%H%M%S}"
    save = Submission(
        owner=model,
        seq=None,
        op="save_weights",
        tenant=TenantId(record["tenant"]),
        payload=codec.encode(SaveWeights(name=name)),
    )
    try:
        receipt = await parts.intake.submit(save)
    except UnknownModel:
        # Its unload is on its way.
        return False
    behind = future_parts(receipt.future_id).seq + 1
    saved = _Saved(uri=f"tinker://{model}/weights/{name}", next_seq=behind, at_ms=parts.now_ms)
    await parts.intake.change_record(RecordKind.MODEL, model, {_FIELD: msgspec.json.encode(saved).decode()})
    _log.info("idle_model_saving", model_id=model, checkpoint=name)
    return True


async def _unload(parts: Parts, model: ModelId, record: Mapping[str, str], *, next_seq: int) -> bool:
    """Unload a model unless it is the one that stays, or got a job in this very moment."""
    if record.get("name") == DEFAULT_MODEL:
        return False
    try:
        # With its seq named, the unload is refused when another job has taken it.
        await parts.intake.submit(replace(unload_of(model, record), seq=next_seq))
    except (SequenceConflict, UnknownModel):
        return False
    _log.info("idle_model_unloading", model_id=model)
    return True
