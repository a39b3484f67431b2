"""Jobs that the worker does on disk, outside every model's order."""

import hashlib

from gradstream.shared import codec
from gradstream.shared.ids import ModelId, TenantId
from gradstream.shared.joblog.port import Submission
from gradstream.shared.wire import DeleteCheckpoint

# Futures of storage jobs share their model's ids with its ordered jobs, whose seqs end below this.
_FIRST_SEQ = 2**31
_SEQ_BYTES = 7


def deletion(path: str, *, run: str, created_ms: str, tenant: TenantId) -> Submission:
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
