"""What an executed job changes in the records that describe models, samplers and checkpoints: a pure function."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from gradstream.engine.checkpoint.location import Ephemeral, parse_uri
from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.shared import ids
from gradstream.shared.activity import ACTIVITY
from gradstream.shared.ids import SamplerId
from gradstream.shared.joblog.port import RecordKind, RecordWrite
from gradstream.shared.model_record import ModelState
from gradstream.shared.wire import (
    CopyCheckpointDone,
    CreateModelDone,
    DeleteCheckpointDone,
    Failed,
    Job,
    LoadWeightsDone,
    Outcome,
    SaveExternalDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    UnloadModelDone,
)

_COPY = "copy_checkpoint"
# Fields of a model's record that the job log's scripts keep, some with a part for each lane, and what the API and the side process note
# of its jobs.
_KEPT_BY_SCRIPTS = {
    "state",
    "epoch",
    "applied",
    "queued",
    "held",
    "next_seq",
    "tail",
    "made_at",
    "ended_at",
    "turned_ms",
}
_MOVING = frozenset({*_KEPT_BY_SCRIPTS, "recorded_at", "scanned", "kill", "idle", *ACTIVITY})


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """A job with its outcome. manifest: of the checkpoint or sampler that the job saved, None when it saved none.

    source: digest of the checkpoint that a load_weights read, None for every other job.
    """

    job: Job
    outcome: Outcome
    manifest: Manifest | None = None
    source: str | None = None


def is_creator(job: Job) -> bool:
    """True when the job makes its model: create_model, or the load_weights that stands in its place.

    A model whose jobs the server numbers may be made again behind its unload, so create_model has any seq.
    """
    return job.op == "create_model" or (job.op == "load_weights" and job.seq == 0)


def saved_uri(outcome: Outcome) -> str | None:
    """The URI that a job saved to, named or a sampler's own; None for every other outcome."""
    match outcome:
        case SaveWeightsDone(path=path) | SaveForSamplerDone(path=str(path)) | SaveExternalDone(path=path):
            return path
        case CopyCheckpointDone(path=path) | CreateModelDone(path=str(path)):
            return path
        case SaveForSamplerDone(sampler_id=str(sampler)):
            return sampler_uri(SamplerId(sampler))
        case _:
            return None


def sampler_uri(sampler: SamplerId) -> str:
    """The URI that Sample.path carries for a sampler with its own weights."""
    return Ephemeral(sampler=sampler).uri()


def record_writes(executed: Executed) -> list[RecordWrite]:
    """The record changes to commit together with the outcome."""
    job, outcome = executed.job, executed.outcome
    match outcome:
        case CreateModelDone(path=str(path)):
            return [_model(job, {"state": ModelState.READY, "last_checkpoint": path}), _checkpoint(path, executed)]
        case CreateModelDone() | LoadWeightsDone() if is_creator(job):
            return [_model(job, {"state": ModelState.READY})]
        case Failed(message=message) if is_creator(job) or job.op == _COPY:
            return [_not_made(job, message)]
        case UnloadModelDone():
            return [_model(job, {"state": ModelState.UNLOADED})]
        case (
            SaveWeightsDone(path=path)
            | SaveForSamplerDone(path=str(path))
            | SaveExternalDone(path=path)
            | CopyCheckpointDone(path=path)
        ):
            return [_checkpoint(path, executed), *_last(executed, path)]
        case DeleteCheckpointDone(path=path, was_replaced=False):
            return [RecordWrite(kind=RecordKind.CHECKPOINT, record_id=path, fields=None)]
        case SaveForSamplerDone(sampler_id=str(sampler)):
            return [_sampler(SamplerId(sampler), executed)]
        case _:
            return []


def record_context(job: Job, model: Mapping[str, str], session: Mapping[str, str] | None) -> list[RecordWrite]:
    """The records of a new model and of its session as the API made them, without what moves with the jobs."""
    fields = {name: value for name, value in model.items() if name.partition(":")[0] not in _MOVING}
    writes = [RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields=fields)]
    if session is not None:
        writes.append(RecordWrite(kind=RecordKind.SESSION, record_id=model["session"], fields=dict(session)))
    return writes


def _not_made(job: Job, message: str) -> RecordWrite:
    """What becomes of the model that a job was to make: a copy's run, which was there for the copy alone, is gone."""
    if job.op == _COPY:
        return RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields=None)
    return _model(job, {"state": ModelState.FAILED, "error": message})


def _last(executed: Executed, path: str) -> list[RecordWrite]:
    """The model's note of its newest checkpoint, for those kinds that have one."""
    job = executed.job
    match executed.outcome:
        case CopyCheckpointDone():
            return [_model(job, {"state": ModelState.UNLOADED, **_last_copy(executed)})]
        case SaveWeightsDone():
            return [_model(job, {"last_checkpoint": path})]
        case SaveForSamplerDone():
            return [_model(job, {"last_sampler_checkpoint": path})]
        case _:
            return []


def _last_copy(executed: Executed) -> dict[str, str]:
    """The run's note of the copy, as a save of its kind would have left it."""
    manifest = _manifest(executed)
    field = {"weights": "last_checkpoint", "sampler_weights": "last_sampler_checkpoint"}.get(manifest.kind)
    return {} if field is None else {field: manifest.source}


def _model(job: Job, fields: dict[str, str]) -> RecordWrite:
    return RecordWrite(kind=RecordKind.MODEL, record_id=job.owner, fields=fields)


def _checkpoint(path: str, executed: Executed) -> RecordWrite:
    return RecordWrite(kind=RecordKind.CHECKPOINT, record_id=path, fields=checkpoint_fields(_manifest(executed)))


def checkpoint_fields(manifest: Manifest) -> dict[str, str]:
    """The record of a checkpoint, as its manifest tells. The fields of an adapter are empty in that of full weights."""
    return {
        "tenant": manifest.tenant,
        "model": manifest.model,
        "kind": manifest.kind,
        "base_model": manifest.base_model,
        **_adapter_fields(manifest),
        "optimizer": msgspec.json.encode(manifest.optimizer).decode(),
        "step": str(manifest.step),
        "has_optimizer": _flag(manifest.has_optimizer),
        "created_ms": str(manifest.created_ms),
        "expires_ms": "" if manifest.expires_ms is None else str(manifest.expires_ms),
        "size_bytes": str(manifest.size_bytes),
        "user_metadata": json.dumps(manifest.user_metadata or {}, sort_keys=True),
        # For downloads, which the API serves without knowing the engine's layout.
        "directory": str(parse_uri(manifest.source).directory(Path())),
        "files": json.dumps({name: entry.size_bytes for name, entry in manifest.files.items()}, sort_keys=True),
    }


def _adapter_fields(manifest: Manifest) -> dict[str, str]:
    lora = manifest.lora
    if lora is None:
        return dict.fromkeys(("rank", "alpha", "seed", "train_attn", "train_mlp", "train_unembed"), "")
    return {
        "rank": str(lora.rank),
        "alpha": str(manifest.scale * lora.rank),
        "seed": "" if lora.seed is None else str(lora.seed),
        "train_attn": _flag(lora.train_attn),
        "train_mlp": _flag(lora.train_mlp),
        "train_unembed": _flag(lora.train_unembed),
    }


def _sampler(sampler: SamplerId, executed: Executed) -> RecordWrite:
    manifest = _manifest(executed)
    fields = {
        "tenant": executed.job.tenant,
        "session": ids.session_of_sampler(sampler),
        "model": manifest.model,
        "base_model": manifest.base_model,
        "model_path": sampler_uri(sampler),
        "created_ms": str(manifest.created_ms),
    }
    return RecordWrite(kind=RecordKind.SAMPLER, record_id=sampler, fields=fields)


def _manifest(executed: Executed) -> Manifest:
    assert executed.manifest is not None, f"{executed.job.future_id} saved a checkpoint without a manifest"
    return executed.manifest


def _flag(value: bool) -> str:
    return "1" if value else "0"
