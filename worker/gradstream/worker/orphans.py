"""Names that are taken by a save which was written but never committed, as its gang died in between: no record knows it."""

from collections.abc import Callable, Sequence

import structlog

from gradstream.engine.checkpoint.location import Checkpoint, CheckpointKind, checkpoint
from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.shared import codec
from gradstream.shared.errors import GradstreamError
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.wire import Job, SaveExternal, SaveForSampler, SaveWeights
from gradstream.worker.rescan import MARK
from gradstream.worker.storage import Storage

_SAVES = frozenset({"save_weights", "save_weights_for_sampler", "save_weights_external"})

_log = structlog.get_logger(__name__)

# The fields of a record, or None.
Recorded = Callable[[RecordKind, str], dict[str, str] | None]


def free_names(jobs: Sequence[Job], *, storage: Storage, recorded: Recorded, settle: Callable[[], None]) -> list[str]:
    """Remove the orphans in the way of jobs that are about to save; their URIs.

    A directory of another job's save is one when no record of it exists. settle is called before records are looked at: it waits until
    everything that this gang did is committed, and raises when another gang has taken over, whose saves may be about to be. In a Redis
    that has lost its records nothing is an orphan until housekeeping has made them anew.
    """
    freed: list[str] = []
    for job in jobs:
        location = _name_of(job)
        if location is None or (manifest := _others(job, location, storage)) is None:
            continue
        settle()
        if recorded(RecordKind.CHECKPOINT, location.uri()) is not None or recorded(RecordKind.STORAGE, MARK) is None:
            continue
        if storage.remove_save(location, created_ms=manifest.created_ms):
            freed.append(location.uri())
            _log.warning("orphan_removed", path=location.uri(), saved_by=manifest.job, future_id=job.future_id)
    return freed


def _name_of(job: Job) -> Checkpoint | None:
    """The name that a job saves to; None when it needs no free one."""
    if job.op not in _SAVES or not job.payload:
        return None
    try:
        match codec.decode_payload(job.payload):
            case SaveWeights(name=name, overwrite=False):
                kind = CheckpointKind.WEIGHTS
            case SaveForSampler(name=str(name)):
                kind = CheckpointKind.SAMPLER_WEIGHTS
            case SaveExternal(name=name):
                kind = CheckpointKind.EXTERNAL_WEIGHTS
            case _:
                return None
        return checkpoint(ModelId(job.owner), kind, name)
    except GradstreamError:
        # The engine refuses it in its own words.
        return None


def _others(job: Job, location: Checkpoint, storage: Storage) -> Manifest | None:
    """The manifest of a save under this name by another job of the same tenant, None when there is none."""
    try:
        manifest = storage.manifest(location.uri())
    except GradstreamError:
        return None
    return None if manifest.job == job.future_id or manifest.tenant != job.tenant else manifest
