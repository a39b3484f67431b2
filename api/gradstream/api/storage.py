"""Checkpoints on their way out: who may delete them, and the jobs that do it, outside every model's order."""

import hashlib

from gradstream.api.names import has_name, shown
from gradstream.api.parts import Parts
from gradstream.api.records import Record, checkpoint_of
from gradstream.shared import codec
from gradstream.shared.errors import Forbidden
from gradstream.shared.ids import INITIAL_CHECKPOINT, ModelId, TenantId
from gradstream.shared.joblog.port import RecordKind, Submission
from gradstream.shared.wire import DeleteCheckpoint

# Futures of storage jobs share their model's ids with its ordered jobs, whose seqs end below this.
_FIRST_SEQ = 2**31
_SEQ_BYTES = 7


def check_may_go(path: str) -> None:
    """Raise Forbidden for the checkpoint that a model of the xorl dialect began with: what its client goes back to."""
    found = checkpoint_of(path, field="checkpoint_id")
    if (found.kind, found.name) == ("weights", INITIAL_CHECKPOINT) and has_name(found.run):
        raise Forbidden(
            f"checkpoint_id: {shown(path)} is the checkpoint that its model began with, and stays; skip_initial_checkpoint: true "
            "makes none"
        )


async def delete_checkpoint(parts: Parts, path: str, record: Record, *, tenant: TenantId) -> None:
    """Nobody can load the checkpoint with this record from now on; its files go when the worker comes to it.

    Raises Forbidden for one that stays.
    """
    check_may_go(path)
    run, created_ms = checkpoint_of(path, field="checkpoint_id").run, record["created_ms"]
    # The job first: if this process dies in between, the job still removes files and record.
    await parts.admission.submit(_deletion(path, run=run, created_ms=created_ms, tenant=tenant))
    await parts.intake.remove_record(RecordKind.CHECKPOINT, path, created_ms=created_ms)


def _deletion(path: str, *, run: str, created_ms: str, tenant: TenantId) -> Submission:
    """The job that deletes one checkpoint. The same save gives the same future, a later save of that name another one.

    It belongs to the run's model, so it stands behind what that model had queued, and before a later save under the same name.
    """
    payload = DeleteCheckpoint(path=path, created_ms=int(created_ms))
    digest = hashlib.blake2b(f"{path} {created_ms}".encode(), digest_size=_SEQ_BYTES).digest()
    return Submission(
        owner=ModelId(run),
        seq=_FIRST_SEQ + int.from_bytes(digest, "big"),
        op=codec.op_of(payload),
        tenant=tenant,
        payload=codec.encode(payload),
        ordered=False,
    )
