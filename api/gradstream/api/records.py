"""Sessions, models, samplers and checkpoints as the API finds them: the caller's own, or not at all."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from gradstream.api.parts import Parts
from gradstream.shared import ids
from gradstream.shared.errors import InvalidRequest, UnknownModel
from gradstream.shared.ids import SessionId, TenantId
from gradstream.shared.joblog.port import RecordKind

Record = Mapping[str, str]
# Of the URIs under which records and the worker know checkpoints, whichever dialect made them.
STORED_SCHEME = "tinker://"
CHECKPOINT_KINDS = ("weights", "sampler_weights", "external_weights")
_MAX_METADATA_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPath:
    """The three parts of tinker://{run}/{kind}/{name}."""

    run: str
    kind: str
    name: str


def checkpoint_path(path: str, *, kind: str, field: str) -> CheckpointPath:
    """The parts of a checkpoint's URI; raises InvalidRequest unless it is well formed and of the given kind."""
    parts = path.removeprefix(STORED_SCHEME).split("/")
    expected = f"{STORED_SCHEME}MODEL/{kind}/NAME"
    if not path.startswith(STORED_SCHEME) or len(parts) != 3:
        raise InvalidRequest(f"{field}: {path[:200]!r} is not a checkpoint's path; it has the form {expected}")
    run, found_kind, name = parts
    if not ids.is_valid_id(run) or not ids.is_valid_name(name):
        raise InvalidRequest(f"{field}: {path[:200]!r} is not a checkpoint's path; it has the form {expected}")
    if found_kind != kind:
        raise InvalidRequest(f"{field}: {path[:200]!r} is a path of kind {found_kind!r}; this call takes {expected}")
    return CheckpointPath(run=run, kind=kind, name=name)


def checkpoint_of(path: str, *, field: str) -> CheckpointPath:
    """The parts of a checkpoint's URI of any kind; raises InvalidRequest unless it is well formed."""
    found = path.removeprefix(STORED_SCHEME).split("/")
    kind = found[1] if len(found) == 3 and found[1] in CHECKPOINT_KINDS else "KIND"
    return checkpoint_path(path, kind=kind, field=field)


def checkpoint_name(name: str) -> str:
    """A new checkpoint's name; raises InvalidRequest unless it can be one part of a path."""
    if not ids.is_valid_name(name):
        raise InvalidRequest(
            f"path: {name[:200]!r} cannot name a checkpoint; use 1 to 128 letters, digits, '_', '-' and '.', starting with a "
            "letter or digit"
        )
    return name


def any_checkpoint_path(run: str, checkpoint_id: str) -> str:
    """The URI of a run's checkpoint, given as KIND/NAME; raises UnknownModel when no checkpoint can have that id."""
    kind, _, name = checkpoint_id.partition("/")
    if not ids.is_valid_id(run) or kind not in CHECKPOINT_KINDS or not ids.is_valid_name(name):
        raise UnknownModel(
            f"checkpoint_id: there is no checkpoint {checkpoint_id[:200]!r} of training run {run[:200]!r}"
        )
    return f"{STORED_SCHEME}{run}/{kind}/{name}"


async def own_record(
    parts: Parts, kind: RecordKind, record_id: str, *, tenant: TenantId, field: str
) -> Mapping[str, str]:
    """The record's fields; raises UnknownModel when there is none, or when it is another tenant's."""
    is_path = kind is RecordKind.CHECKPOINT
    record = await parts.intake.record(kind, record_id) if is_path or ids.is_valid_id(record_id) else None
    if record is None or record.get("tenant") != tenant:
        raise UnknownModel(f"{field}: there is no {kind.value} {record_id[:200]!r}")
    return record


async def open_session(parts: Parts, session_id: str, *, tenant: TenantId) -> SessionId:
    """The id of a session that may own new things; raises UnknownModel, or InvalidRequest when it was finished."""
    record = await own_record(parts, RecordKind.SESSION, session_id, tenant=tenant, field="session_id")
    if "finished_ms" in record:
        raise InvalidRequest(f"session_id: session {session_id!r} was finished; create a new session")
    return SessionId(session_id)


# Any: clients may put any JSON into their metadata; it is stored as text and never interpreted.
def text_metadata(metadata: Mapping[str, Any] | None, *, field: str = "user_metadata") -> dict[str, str] | None:
    """The metadata in key order with values as text; what is not text is kept as JSON. Raises InvalidRequest when too large."""
    if metadata is None:
        return None
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in sorted(metadata.items())
    }
    num_bytes = sum(len(key) + len(value) for key, value in texts.items())
    if num_bytes > _MAX_METADATA_BYTES:
        raise InvalidRequest(f"{field}: {num_bytes} characters; at most {_MAX_METADATA_BYTES} are kept")
    return texts


def when(milliseconds: str) -> datetime:
    """The time of milliseconds since the Unix epoch."""
    return datetime.fromtimestamp(int(milliseconds) / 1000, tz=UTC)


def metadata_of(record: Record) -> dict[str, str] | None:
    """The record's user_metadata, None when it is empty."""
    return json.loads(record.get("user_metadata") or "{}") or None
