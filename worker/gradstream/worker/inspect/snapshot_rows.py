"""The snapshots of an engine as rows, read without torch."""

from collections.abc import Collection
from pathlib import Path, PurePosixPath

import msgspec

from gradstream.engine.checkpoint.manifest import damage_of
from gradstream.engine.snapshot.cut import Cut, CutId, ModelEntry, cut_ids, cut_path, read_cut
from gradstream.shared.errors import StorageFailure
from gradstream.shared.joblog.port import BatchId


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a snapshot. is_own: its files were written with it, and not with an earlier one that it shares them with."""

    model: str
    tenant: str
    kind: str
    step: int
    has_grad: bool
    size_bytes: int
    directory: str
    is_own: bool


class SnapshotRow(msgspec.Struct, frozen=True, kw_only=True):
    """One snapshot. batch: the last one that it holds. size_bytes: of all its models' files, own_bytes: of those written with it.

    log_segment, log_offset: where a replay goes on reading the log. is_valid: None unless verified; problem says why not.
    """

    batch: str
    file: str
    created_ms: int = 0
    cursor: str = ""
    log_segment: str = ""
    log_offset: int = 0
    fingerprint: str = ""
    size_bytes: int = 0
    own_bytes: int = 0
    models: list[ModelRow] = []
    is_valid: bool | None = None
    problem: str | None = None


def snapshot_rows(
    directory: Path, *, verify: bool = False, batches: Collection[BatchId] | None = None
) -> list[SnapshotRow]:
    """Every snapshot below the store's directory, newest first.

    verify: read every file and compare its SHA-256. batches: those of the log that count; a snapshot at any other does not, since a
    gang that had lost its lease made it; None when that is not to be looked at.
    """
    return [_row(directory, cut_id, verify=verify, batches=batches) for cut_id in cut_ids(directory)]


def _row(directory: Path, cut_id: CutId, *, verify: bool, batches: Collection[BatchId] | None) -> SnapshotRow:
    batch, file = BatchId(*cut_id), cut_path(directory, cut_id).name
    try:
        cut = read_cut(directory, cut_id)
    except StorageFailure as failure:
        return SnapshotRow(batch=str(batch), file=file, is_valid=False, problem=failure.message)
    head = cut.head
    models = [_model_row(cut, model_id, model) for model_id, model in sorted(cut.models.items())]
    problem = _problem(directory, cut, batch, batches) if verify else None
    return SnapshotRow(
        batch=str(batch),
        file=file,
        created_ms=head.created_ms,
        cursor=head.cursor,
        log_segment=head.log_segment,
        log_offset=head.log_offset,
        fingerprint=head.fingerprint,
        size_bytes=cut.size_bytes,
        own_bytes=sum(model.size_bytes for model in models if model.is_own),
        models=models,
        is_valid=problem is None if verify else None,
        problem=problem,
    )


def _problem(directory: Path, cut: Cut, batch: BatchId, batches: Collection[BatchId] | None) -> str | None:
    """What is wrong with a snapshot, None when nothing is."""
    if batches is not None and batch not in batches:
        return f"batch {batch} is not one of the log: a gang that had lost its lease made it"
    for model_id, model in cut.models.items():
        damage = damage_of(directory / model.directory, model.files)
        if damage is not None:
            return f"model {model_id}: {damage}"
    return None


def _model_row(cut: Cut, model_id: str, model: ModelEntry) -> ModelRow:
    return ModelRow(
        model=model_id,
        tenant=model.tenant,
        kind=model.kind,
        step=model.step,
        has_grad=model.has_grad,
        size_bytes=model.size_bytes,
        directory=model.directory,
        is_own=PurePosixPath(model.directory).name == cut.name,
    )
