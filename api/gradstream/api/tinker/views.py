"""Training runs and checkpoints as the REST calls show them, made from their records."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict

from gradstream.api.parts import Parts
from gradstream.api.xorl.models import name_of
from gradstream.api.xorl.paths import shown
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.port import RecordKind

Record = Mapping[str, str]
_SCHEME = "tinker://"
_TYPES: Mapping[str, Literal["training", "sampler", "external"]] = {
    "weights": "training",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
# A model in one of these states takes no more training, and its state is gone without having been dropped on purpose.
_CORRUPTED = frozenset({"lost", "failed"})


class Cursor(BaseModel):
    offset: int
    limit: int
    total_count: int


class Checkpoint(BaseModel):
    """tinker_path and path: the same checkpoint, as clients of the two dialects call it."""

    checkpoint_id: str
    checkpoint_type: Literal["training", "sampler", "external"]
    time: datetime
    tinker_path: str
    path: str
    size_bytes: int | None
    public: bool
    user_metadata: dict[str, str] | None
    expires_at: datetime | None


class TrainingRun(BaseModel):
    """training_run_id: of a model that its client named, this name. lora_rank: null for full weights."""

    model_config = ConfigDict(protected_namespaces=())

    training_run_id: str
    base_model: str
    model_owner: str
    is_lora: bool
    corrupted: bool
    lora_rank: int | None
    last_request_time: datetime
    last_checkpoint: Checkpoint | None
    last_sampler_checkpoint: Checkpoint | None
    user_metadata: dict[str, str] | None


def when(milliseconds: str) -> datetime:
    """The time of milliseconds since the Unix epoch."""
    return datetime.fromtimestamp(int(milliseconds) / 1000, tz=UTC)


def metadata(record: Record) -> dict[str, str] | None:
    """The record's user_metadata, None when it is empty."""
    return json.loads(record.get("user_metadata") or "{}") or None


def checkpoint_view(path: str, record: Record) -> Checkpoint:
    """A checkpoint's record for a client. path: its URI."""
    _, _, checkpoint_id = path.removeprefix(_SCHEME).partition("/")
    size_bytes, expires_ms = record.get("size_bytes"), record.get("expires_ms")
    return Checkpoint(
        checkpoint_id=checkpoint_id,
        checkpoint_type=_TYPES[checkpoint_id.partition("/")[0]],
        time=when(record["created_ms"]),
        tinker_path=path,
        path=shown(path),
        size_bytes=int(size_bytes) if size_bytes else None,
        public=record.get("public") == "1",
        user_metadata=metadata(record),
        expires_at=when(expires_ms) if expires_ms else None,
    )


async def run_view(parts: Parts, run: str, record: Record, *, tenant: TenantId) -> TrainingRun:
    """A model's record for a client, also after the model left the gang's memory."""
    rank = record.get("rank")
    return TrainingRun(
        training_run_id=name_of(run) if record.get("dialect") == "xorl" else run,
        base_model=record.get("base_model", ""),
        model_owner=tenant,
        is_lora=record.get("rank") != "",
        corrupted=record.get("state") in _CORRUPTED,
        lora_rank=int(rank) if rank else None,
        last_request_time=when(record.get("used_ms") or record["created_ms"]),
        last_checkpoint=await _last(parts, record.get("last_checkpoint"), tenant=tenant),
        last_sampler_checkpoint=await _last(parts, record.get("last_sampler_checkpoint"), tenant=tenant),
        user_metadata=metadata(record),
    )


async def _last(parts: Parts, path: str | None, *, tenant: TenantId) -> Checkpoint | None:
    """The checkpoint, None when it was deleted or has expired."""
    record = await parts.intake.record(RecordKind.CHECKPOINT, path) if path else None
    if path is None or record is None or record.get("tenant") != tenant:
        return None
    return checkpoint_view(path, record)
