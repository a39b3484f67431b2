"""Sessions that ended: when that is, and what is taken from them.

A sweep may be repeated at any point: it looks at what is there and does what is left to do. None touches the gang; a model leaves
its memory through an ordinary job.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import structlog

from gradstream.engine.checkpoint.location import ephemeral
from gradstream.shared import codec
from gradstream.shared.errors import QueueFull, UnknownModel
from gradstream.shared.ids import UNLOAD_SEQ, ModelId, SamplerId, TenantId
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.port import Intake, RecordKind, Submission
from gradstream.shared.model_record import OPEN_STATES, Dialect, dialect_of, num_open_jobs
from gradstream.shared.wire import UnloadModel
from gradstream.worker.storage import Storage

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What sweeps work with. now_ms: wall time."""

    census: RedisCensus
    intake: Intake
    storage: Storage
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a silent session lives: grace_s for clients that send heartbeats, idle_s for those that never did.

    Silence is counted from awake_ms on at the earliest: before it the server, or the whole machine, was not there to listen.
    """

    grace_s: float
    idle_s: float
    awake_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a session's models tell: when the newest of their jobs was accepted, and whether one is open."""

    used_ms: int = 0
    has_open_jobs: bool = False


def has_ended(session: Mapping[str, str], *, now_ms: int, patience: Patience, activity: Activity | None = None) -> bool:
    """True when a session was finished or fell silent, and that was not dealt with before. Open jobs are a sign of life."""
    activity = activity or Activity()
    created_ms = int(session.get("created_ms") or now_ms)
    heartbeat_ms = int(session.get("heartbeat_ms") or created_ms)
    last_ms = max(heartbeat_ms, activity.used_ms)
    limit_s = patience.grace_s if heartbeat_ms > created_ms else patience.idle_s
    is_silent = now_ms - max(last_ms, patience.awake_ms) > 1000 * limit_s and not activity.has_open_jobs
    is_finished = "finished_ms" in session
    swept_ms = int(session.get("swept_ms", "-1"))
    return (is_finished or is_silent) and swept_ms < max(last_ms, int(session.get("finished_ms", "0")))


async def sweep_sessions(parts: Parts, *, patience: Patience) -> int:
    """Unload the models and remove the samplers of sessions that ended; how many sessions."""
    models = dict(parts.census.records(RecordKind.MODEL))
    activities = activity_by_session(models.values())
    ended = {
        name
        for name, fields in parts.census.records(RecordKind.SESSION)
        if has_ended(fields, now_ms=parts.now_ms, patience=patience, activity=activities.get(name))
    }
    if not ended:
        return 0
    # A session with a model that the queue does not let go now is one of the next sweep.
    ended -= await _unload_models(parts, models, ended)
    _remove_samplers(parts, ended)
    for session in ended:
        await parts.intake.change_record(RecordKind.SESSION, session, {"swept_ms": str(parts.now_ms)})
        _log.info("session_swept", session_id=session)
    return len(ended)


def activity_by_session(models: Iterable[Mapping[str, str]]) -> dict[str, Activity]:
    """The activity of every session that has a model."""
    found: dict[str, Activity] = {}
    for fields in models:
        session = fields.get("session", "")
        before = found.get(session, Activity())
        found[session] = Activity(
            used_ms=max(before.used_ms, int(fields.get("used_ms", "0"))),
            has_open_jobs=before.has_open_jobs or num_open_jobs(fields) > 0,
        )
    return found


async def _unload_models(parts: Parts, models: Mapping[str, Mapping[str, str]], sessions: AbstractSet[str]) -> set[str]:
    """Submit the unloads of the sessions' models; the sessions of which one was refused."""
    refused: set[str] = set()
    for model, fields in models.items():
        if fields.get("session", "") in sessions and fields.get("state") in OPEN_STATES:
            try:
                receipt = await parts.intake.submit(unload_of(ModelId(model), fields))
            except UnknownModel:
                # Its unload is on its way, or its record went meanwhile.
                continue
            except QueueFull as error:
                _log.warning("model_not_unloaded", model_id=model, reason=error.message)
                refused.add(fields.get("session", ""))
                continue
            _log.info("model_unloading", model_id=model, future_id=receipt.future_id)
    return refused


def unload_of(model: ModelId, fields: Mapping[str, str]) -> Submission:
    """The unload of a model with this record: one of its ordered jobs where the server numbers those, else beside them."""
    is_numbered = dialect_of(fields) is Dialect.XORL
    return Submission(
        owner=model,
        seq=None if is_numbered else UNLOAD_SEQ,
        op="unload_model",
        tenant=TenantId(fields["tenant"]),
        payload=codec.encode(UnloadModel()),
        ordered=is_numbered,
    )


def _remove_samplers(parts: Parts, sessions: AbstractSet[str]) -> None:
    for sampler, fields in parts.census.records(RecordKind.SAMPLER):
        if session_of(sampler, fields) in sessions:
            parts.storage.remove(ephemeral(SamplerId(sampler)))
            parts.census.remove(RecordKind.SAMPLER, sampler)


def session_of(sampler: str, fields: Mapping[str, str]) -> str:
    """The session that owns a sampler: as recorded, else as its id says (`{session}:sample:{n}`)."""
    return fields.get("session") or sampler.rsplit(":sample:", 1)[0]
