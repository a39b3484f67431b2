"""Records of checkpoints made anew from their manifests, for a Redis that has lost them."""

import structlog

from gradstream.engine.checkpoint.manifest import Manifest
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.model_record import ModelState
from gradstream.worker.records import checkpoint_fields
from gradstream.worker.sweeps import Parts

# Says that this Redis has heard of what was on disk. Without it a deletion that still waits in the log could be undone.
MARK = ".scanned"

_log = structlog.get_logger(__name__)


async def rescan(parts: Parts) -> int:
    """Make the missing record of every checkpoint on disk, and of the model it is from, once in the life of a Redis; how many.

    Records that exist are left as they are. Such a model is listed with its checkpoints, and takes no jobs.
    """
    if await parts.intake.record(RecordKind.STORAGE, MARK) is not None:
        return 0
    num_made = 0
    for manifest in parts.storage.checkpoints():
        if manifest.expires_ms is not None and manifest.expires_ms <= parts.now_ms:
            parts.storage.remove_saved(manifest)
            continue
        await parts.intake.add_record(RecordKind.MODEL, manifest.model, _model_fields(manifest))
        num_made += await parts.intake.add_record(RecordKind.CHECKPOINT, manifest.source, checkpoint_fields(manifest))
    await parts.intake.put_record(RecordKind.STORAGE, MARK, {"scanned_ms": str(parts.now_ms)})
    _log.info("checkpoints_scanned", num_made=num_made)
    return num_made


def _model_fields(manifest: Manifest) -> dict[str, str]:
    saved = checkpoint_fields(manifest)
    kept = ("tenant", "base_model", "rank", "seed", "train_attn", "train_mlp", "train_unembed", "created_ms")
    session = manifest.model.rsplit(":train:", 1)[0]
    return {
        **{name: saved[name] for name in kept},
        "session": session,
        "state": ModelState.UNLOADED,
        "next_seq": "0",
        "applied": "-1",
        "scanned": "1",
    }
