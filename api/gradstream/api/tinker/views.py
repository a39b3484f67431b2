"""Training runs as the REST calls show them, made from the records of models."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict

from gradstream.api.checkpoint_views import Checkpoint, checkpoint_view
from gradstream.api.parts import Parts
from gradstream.api.records import Record, metadata_of, when
from gradstream.shared.ids import TenantId, name_of
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.model_record import BROKEN_STATES, Dialect, dialect_of


class Cursor(BaseModel):
    offset: int
    limit: int
    total_count: int


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


async def run_view(parts: Parts, run: str, record: Record, *, tenant: TenantId) -> TrainingRun:
    """A model's record for a client, also after the model left the gang's memory."""
    rank = record.get("rank")
    return TrainingRun(
        training_run_id=name_of(run) if dialect_of(record) is Dialect.XORL else run,
        base_model=record.get("base_model", ""),
        model_owner=tenant,
        is_lora=record.get("rank") != "",
        corrupted=record.get("state") in BROKEN_STATES,
        lora_rank=int(rank) if rank else None,
        last_request_time=when(record.get("used_ms") or record["created_ms"]),
        last_checkpoint=await _last(parts, record.get("last_checkpoint"), tenant=tenant),
        last_sampler_checkpoint=await _last(parts, record.get("last_sampler_checkpoint"), tenant=tenant),
        user_metadata=metadata_of(record),
    )


async def _last(parts: Parts, path: str | None, *, tenant: TenantId) -> Checkpoint | None:
    """The checkpoint, None when it was deleted or has expired."""
    record = await parts.intake.record(RecordKind.CHECKPOINT, path) if path else None
    if path is None or record is None or record.get("tenant") != tenant:
        return None
    return checkpoint_view(path, record)
