"""Records of what is over for long: they leave Redis, whose memory is not endless."""

from collections import Counter
from collections.abc import Mapping

import structlog

from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.model_record import BROKEN_STATES, ModelState
from gradstream.worker.sweeps import Parts, session_of

# Long enough to look at a run after a holiday.
RETENTION_S = 14 * 24 * 3600.0
_OVER = BROKEN_STATES | {ModelState.UNLOADED}

_log = structlog.get_logger(__name__)


def sweep_records(parts: Parts) -> int:
    """Remove the records of models, samplers and sessions that nobody used for RETENTION_S; how many.

    A model stays listed as long as one of its checkpoints lies on disk, a session as long as one of its models is listed.
    """
    before_ms = parts.now_ms - 1000 * RETENTION_S
    sessions = dict(parts.census.records(RecordKind.SESSION))
    saved = Counter(fields.get("model", "") for _, fields in parts.census.records(RecordKind.CHECKPOINT))
    parents: Counter[str] = Counter()
    num_removed = 0
    for model, fields in parts.census.records(RecordKind.MODEL):
        last_ms = _newest(fields, "used_ms", "created_ms", now_ms=parts.now_ms)
        is_over = fields.get("state") in _OVER and last_ms < before_ms and not saved[model]
        if is_over and parts.census.remove(RecordKind.MODEL, model):
            num_removed += 1
        else:
            parents[fields.get("session", "")] += 1
    for sampler, fields in parts.census.records(RecordKind.SAMPLER):
        if (
            session_of(sampler, fields) not in sessions
            and _newest(fields, "created_ms", now_ms=parts.now_ms) < before_ms
        ):
            num_removed += parts.census.remove(RecordKind.SAMPLER, sampler)
    for session, fields in sessions.items():
        last_ms = _newest(fields, "heartbeat_ms", "swept_ms", now_ms=parts.now_ms)
        if "swept_ms" in fields and last_ms < before_ms and not parents[session]:
            num_removed += parts.census.remove(RecordKind.SESSION, session)
    if num_removed:
        _log.info("records_removed", num=num_removed)
    return num_removed


def _newest(fields: Mapping[str, str], *names: str, now_ms: int) -> int:
    """The latest of a record's times; now when it has none of them."""
    return max((int(fields[name]) for name in names if fields.get(name)), default=now_ms)
