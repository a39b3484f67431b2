"""The snapshots of an engine as rows, read without torch.

Only what people ask for is decoded; the whole format, and everything that loads one, is in the engine's snapshot package.
"""

import hashlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath

import msgspec

from gradstream.engine.checkpoint.manifest import FileEntry, damage_of
from gradstream.shared.errors import StorageFailure
from gradstream.shared.joblog.port import BatchId

_VERSION = 1
_CUTS = "cuts"


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


class _Head(msgspec.Struct):
    epoch: int
    number: int
    cursor: str
    log_segment: str
    log_offset: int
    fingerprint: str
    created_ms: int


class _Model(msgspec.Struct):
    directory: str
    files: dict[str, FileEntry]
    kind: str
    tenant: str
    step: int
    has_grad: bool


class _Cut(msgspec.Struct):
    head: _Head
    models: dict[str, _Model]


class _File(msgspec.Struct):
    version: int
    sha256: str
    cut: msgspec.Raw


def snapshot_rows(
    directory: Path, *, verify: bool = False, batches: Collection[BatchId] | None = None
) -> list[SnapshotRow]:
    """Every snapshot below the store's directory, newest first.

    verify: read every file and compare its SHA-256. batches: those of the log that count; a snapshot at any other does not, since a
    gang that had lost its lease made it; None when that is not to be looked at.
    """
    paths = sorted((directory / _CUTS).glob("[!.]*.json"), reverse=True)
    return [_row(directory, path, verify=verify, batches=batches) for path in paths]


def _row(directory: Path, path: Path, *, verify: bool, batches: Collection[BatchId] | None) -> SnapshotRow:
    name = path.stem
    try:
        cut = _read(path)
    except (OSError, StorageFailure, msgspec.DecodeError, UnicodeDecodeError) as error:
        return SnapshotRow(batch=_named(name), file=path.name, is_valid=False, problem=str(error))
    head = cut.head
    batch = BatchId(head.epoch, head.number)
    models = [_model_row(name, model_id, model) for model_id, model in sorted(cut.models.items())]
    problem = _problem(directory, cut, batch, batches) if verify else None
    return SnapshotRow(
        batch=str(batch),
        file=path.name,
        created_ms=head.created_ms,
        cursor=head.cursor,
        log_segment=head.log_segment,
        log_offset=head.log_offset,
        fingerprint=head.fingerprint,
        size_bytes=sum(model.size_bytes for model in models),
        own_bytes=sum(model.size_bytes for model in models if model.is_own),
        models=models,
        is_valid=problem is None if verify else None,
        problem=problem,
    )


def _read(path: Path) -> _Cut:
    """Raises OSError, StorageFailure, msgspec.DecodeError, UnicodeDecodeError."""
    file = msgspec.json.decode(path.read_bytes(), type=_File)
    if file.version != _VERSION:
        raise StorageFailure(f"format version {file.version}; this gradstream reads version {_VERSION}")
    text = msgspec.json.format(bytes(file.cut), indent=-1)
    if hashlib.sha256(text).hexdigest() != file.sha256:
        raise StorageFailure("damaged: it does not have its own digest")
    cut = msgspec.json.decode(text, type=_Cut)
    paths = [PurePosixPath(model.directory) for model in cut.models.values()]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        raise StorageFailure("a path in it leads out of the snapshots")
    return cut


def _problem(directory: Path, cut: _Cut, batch: BatchId, batches: Collection[BatchId] | None) -> str | None:
    """What is wrong with a snapshot, None when nothing is."""
    if batches is not None and batch not in batches:
        return f"batch {batch} is not one of the log: a gang that had lost its lease made it"
    for model_id, model in cut.models.items():
        damage = damage_of(directory / model.directory, model.files)
        if damage is not None:
            return f"model {model_id}: {damage}"
    return None


def _model_row(cut_name: str, model_id: str, model: _Model) -> ModelRow:
    return ModelRow(
        model=model_id,
        tenant=model.tenant,
        kind=model.kind,
        step=model.step,
        has_grad=model.has_grad,
        size_bytes=sum(entry.size_bytes for entry in model.files.values()),
        directory=model.directory,
        is_own=PurePosixPath(model.directory).name == cut_name,
    )


def _named(name: str) -> str:
    """The batch that a file's name stands for, the name itself when it is none."""
    epoch, _, number = name.partition("-")
    return str(BatchId(int(epoch), int(number))) if epoch.isdecimal() and number.isdecimal() else name
