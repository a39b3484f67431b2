"""Jobs that only touch the disk: the leader does them itself, between batches, whether or not their model is loaded."""

from gradstream.engine.checkpoint.copy import CopyOrder
from gradstream.engine.checkpoint.location import Checkpoint, parse_uri
from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError, InvalidRequest, StorageFailure, UnknownModel
from gradstream.shared.wire import (
    CopyCheckpoint,
    CopyCheckpointDone,
    DeleteCheckpoint,
    DeleteCheckpointDone,
    Failed,
    Job,
    Outcome,
)
from gradstream.worker.storage import Storage

# Jobs that rank 0 does between batches.
STORAGE_OPS = frozenset({"copy_checkpoint", "delete_checkpoint"})


def storage_outcome(job: Job, storage: Storage) -> Outcome | None:
    """The outcome of a storage job, None for a job of any other op. Doing one again changes nothing."""
    if job.op not in STORAGE_OPS or not job.payload:
        return None
    try:
        match codec.decode_payload(job.payload):
            case DeleteCheckpoint() as deletion:
                return _delete(job, deletion, storage)
            case CopyCheckpoint() as copy:
                return _copy(job, copy, storage)
            case _:
                return None
    except GradstreamError as error:
        return Failed.of(error)


def _copy(job: Job, copy: CopyCheckpoint, storage: Storage) -> Outcome:
    """Raises UnknownModel (no source, or another tenant's), InvalidRequest, CheckpointExists, StorageLimit, StorageFailure."""
    source, target = parse_uri(copy.source), parse_uri(copy.path)
    if not isinstance(source, Checkpoint) or not isinstance(target, Checkpoint) or target.model != job.owner:
        raise InvalidRequest(f"{copy.source} cannot be copied to {copy.path}")
    storage.copy(
        CopyOrder(source=source, target=target, job=job.future_id, tenant=job.tenant, ttl_seconds=copy.ttl_seconds)
    )
    return CopyCheckpointDone(path=copy.path)


def _delete(job: Job, deletion: DeleteCheckpoint, storage: Storage) -> Outcome:
    """Done also when there is nothing to delete, as it was deleted before; raises UnknownModel when it is another tenant's."""
    path = deletion.path
    manifest = _manifest(path, storage)
    if manifest is None:
        return DeleteCheckpointDone(path=path)
    if manifest.tenant != job.tenant:
        raise UnknownModel(f"there is no checkpoint {path}")
    if deletion.created_ms not in {0, manifest.created_ms}:
        return DeleteCheckpointDone(path=path, was_replaced=True)
    try:
        storage.remove_saved(manifest)
    except OSError as error:
        raise StorageFailure(f"checkpoint {path} cannot be deleted: {error.strerror}") from error
    return DeleteCheckpointDone(path=path)


def _manifest(path: str, storage: Storage) -> Manifest | None:
    try:
        return storage.manifest(path)
    except UnknownModel:
        return None
