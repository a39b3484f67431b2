"""What the housekeeping tasks decide and do: sessions that ended, checkpoints past their time.

Each sweep may be repeated at any point: it looks at what is there and does what is left to do. None touches the gang; a model
leaves its memory through an ordinary job.
"""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import structlog

from gradstream.engine.checkpoint.location import ephemeral, parse_uri
from gradstream.shared import codec
from gradstream.shared.errors import StorageFailure, UnknownModel
from gradstream.shared.ids import ModelId, SamplerId, TenantId
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.port import Intake, RecordKind, Submission
from gradstream.shared.wire import UnloadModel
from gradstream.worker.storage import Storage

# The unload of a model stands outside its seq order: it goes to the end of the log, behind everything accepted, and its fixed seq
# makes every repetition, by whomever, the same future.
UNLOAD_SEQ = 2**31 - 1
_IN_MEMORY = frozenset({"creating", "ready"})

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What sweeps work with. now_ms: wall time."""

    census: RedisCensus
    intake: Intake
    storage: Storage
    now_ms: int


def has_ended(session: Mapping[str, str], *, now_ms: int, grace_s: float) -> bool:
    """True when a session was finished or missed its heartbeats, and that was not dealt with before."""
    last_ms = int(session.get("heartbeat_ms") or session.get("created_ms") or now_ms)
    is_over = "finished_ms" in session or now_ms - last_ms > 1000 * grace_s
    swept_ms = int(session.get("swept_ms", "-1"))
    return is_over and swept_ms < max(last_ms, int(session.get("finished_ms", "0")))


async def sweep_sessions(parts: Parts, *, grace_s: float) -> int:
    """Unload the models and remove the samplers of sessions that ended; how many sessions."""
    sessions = dict(parts.census.records(RecordKind.SESSION))
    ended = {name for name, fields in sessions.items() if has_ended(fields, now_ms=parts.now_ms, grace_s=grace_s)}
    if not ended:
        return 0
    await _unload_models(parts, ended)
    _remove_samplers(parts, ended)
    for session in ended:
        await parts.intake.put_record(RecordKind.SESSION, session, {"swept_ms": str(parts.now_ms)})
        _log.info("session_swept", session_id=session)
    return len(ended)


async def _unload_models(parts: Parts, sessions: AbstractSet[str]) -> None:
    for model, fields in parts.census.records(RecordKind.MODEL):
        if fields.get("session", "") in sessions and fields.get("state") in _IN_MEMORY:
            unload = Submission(
                owner=ModelId(model),
                seq=UNLOAD_SEQ,
                op="unload_model",
                tenant=TenantId(fields["tenant"]),
                payload=codec.encode(UnloadModel()),
                ordered=False,
            )
            receipt = await parts.intake.submit(unload)
            _log.info("model_unloading", model_id=model, future_id=receipt.future_id)


def _remove_samplers(parts: Parts, sessions: AbstractSet[str]) -> None:
    for sampler, fields in parts.census.records(RecordKind.SAMPLER):
        if session_of(sampler, fields) in sessions:
            parts.storage.remove(ephemeral(SamplerId(sampler)))
            parts.census.remove(RecordKind.SAMPLER, sampler)


def session_of(sampler: str, fields: Mapping[str, str]) -> str:
    """The session that owns a sampler: as recorded, else as its id says (`{session}:sample:{n}`)."""
    return fields.get("session") or sampler.rsplit(":sample:", 1)[0]


def sweep_checkpoints(parts: Parts) -> int:
    """Remove checkpoints whose time to live is over; how many. A newer save under the same name stays."""
    num_removed = 0
    for uri, fields in parts.census.records(RecordKind.CHECKPOINT):
        expires_ms = fields.get("expires_ms")
        if not expires_ms or int(expires_ms) > parts.now_ms or _is_newer(parts, uri, fields):
            continue
        parts.storage.remove(parse_uri(uri))
        parts.census.remove(RecordKind.CHECKPOINT, uri)
        num_removed += 1
        _log.info("checkpoint_expired", path=uri)
    return num_removed


def _is_newer(parts: Parts, uri: str, fields: Mapping[str, str]) -> bool:
    """True when the save on disk is a later one than the recorded: it replaced that a moment ago."""
    try:
        manifest = parts.storage.manifest(uri)
    except (UnknownModel, StorageFailure):
        return False
    return manifest.created_ms > int(fields["created_ms"])
