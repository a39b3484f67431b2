"""A submission as the arguments of the submit script, and the script's answers as errors."""

from collections.abc import Sequence
from typing import NamedTuple

from gradstream.shared.errors import (
    GradstreamError,
    PayloadTooLarge,
    QueueFull,
    SequenceConflict,
    Unavailable,
    UnknownModel,
)
from gradstream.shared.ids import FutureId, OwnerId, future_id, is_valid_id, seq_text
from gradstream.shared.joblog.batcher import Value
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.packed import Packed, former_digest
from gradstream.shared.joblog.port import Submission

# Lua counts in doubles.
_MAX_SEQ = 2**53 - 2**20
# Without order a seq is only text to Lua; samplers of cloned clients count from clone_id * 10**9.
_MAX_UNORDERED_SEQ = 2**63 - 1

_CONFLICTS = {
    "payload": "was used with another payload; send the same payload again, or use the next seq_id",
    "refused": "was used by a request that was refused; correct the request and send it with a new seq_id",
    "gap": "came too late: the jobs behind it had waited for it and failed; go on with a new seq_id",
    "exists": "makes a model that exists already",
    "old": "is below the model's next one and too old to tell whether this is a retry; use the next seq_id",
}
_BUDGETS = {
    "window": "seq_id is {used} ahead of the model's next one, and {limit} are held at most",
    "jobs": "{used} jobs are queued here, the limit is {limit}",
    "tenant_jobs": "{used} jobs of this tenant are queued, the limit is {limit}",
    "unread": "the results that this tenant has not fetched take {used} bytes, the limit is {limit}; fetch some, or wait until they expire",
    "tenant_bytes": "{used} bytes of this tenant are queued, the limit is {limit}",
    "bytes": "{used} bytes are queued, the limit is {limit}",
    "share": "{used} bytes of this tenant are queued, and it may hold as many as are free: {limit}",
}


class Seen(NamedTuple):
    """How far the queue was known to be: the epoch and the newest log entry."""

    epoch: int = 0
    entry: int = 0

    def and_then(self, epoch: int, entry: int) -> "Seen":
        """What is known after an answer; those of one epoch may come in any order."""
        return Seen(epoch, max(self.entry, entry) if epoch == self.epoch else entry)


def check_submission(submission: Submission) -> None:
    """Raise ValueError when the submission cannot be stored."""
    if submission.seq is not None:
        check_ids(submission.owner, submission.seq, is_ordered=submission.ordered)
    elif not submission.ordered:
        raise ValueError(f"owner {submission.owner!r}: a job without order needs a seq")
    elif not is_valid_id(submission.owner):
        raise ValueError(f"owner {submission.owner!r} is not a valid id")


def blob_key(submission: Submission, packed: Packed, *, keys: Keys) -> str:
    """Where the payload lies beside the stream."""
    if submission.seq is None:
        return keys.unnumbered_blob(submission.owner, submission.call, packed.digest)
    return keys.blob(future_id(submission.owner, submission.seq), packed.digest)


def check_ids(owner: OwnerId, seq: int, *, is_ordered: bool = True) -> FutureId:
    """The future id of (owner, seq); ValueError when one of them cannot be stored."""
    if not is_valid_id(owner):
        raise ValueError(f"owner {owner!r} is not a valid id")
    max_seq = _MAX_SEQ if is_ordered else _MAX_UNORDERED_SEQ
    if not 0 <= seq <= max_seq:
        raise ValueError(f"seq {seq} is not between 0 and {max_seq}")
    return future_id(owner, seq)


def check_size(submission: Submission, packed: Packed, limits: Limits) -> None:
    """Raise PayloadTooLarge for a payload that would never find room."""
    if len(submission.payload) > limits.max_payload_bytes:
        raise PayloadTooLarge(
            f"payload: {len(submission.payload)} bytes; this server takes {limits.max_payload_bytes} at most"
        )
    # Three quarters, so that it also fits when it must be held.
    room = min(limits.max_queued_bytes_per_tenant, limits.max_queued_bytes) * 3 // 4
    if len(packed.data) > room:
        raise PayloadTooLarge(f"payload: {len(packed.data)} bytes as stored; the queue has room for {room} at most")


def submit_args(
    submission: Submission, packed: Packed, *, blob: str, seen: Seen, keys: Keys, limits: Limits
) -> list[Value]:
    """ARGV of submit.lua. blob is the key of the payload beside the stream, or empty. seen: what the last answers told."""
    is_ordered = submission.ordered
    again = ""
    if submission.retry_key:
        again = keys.again(
            submission.owner, submission.retry_key, submission.retry_digest or former_digest(submission.payload)
        )
    record: list[Value] = []
    for name, value in (submission.model_record or {}).items():
        record += [name, value]
    return [
        keys.prefix,
        submission.owner,
        "" if submission.seq is None else submission.seq,
        submission.op,
        submission.tenant,
        packed.digest,
        len(packed.data),
        submission.num_tokens,
        packed.enc,
        b"" if blob else packed.data,
        blob,
        int(is_ordered),
        limits.max_queued_jobs_per_model if is_ordered else limits.max_queued_jobs_per_sampler,
        limits.hold_window,
        limits.max_queued_bytes_per_tenant,
        limits.max_queued_bytes,
        limits.keep_seqs,
        int(submission.model_record is not None),
        limits.max_queued_jobs_per_tenant,
        limits.max_unread_bytes_per_tenant,
        keys.once(submission.owner, submission.call),
        again,
        limits.retry_window_s,
        submission.age_ms,
        *seen,
        *record,
    ]


def conflicting_digest(reply: Sequence[bytes | int]) -> str | None:
    """The digest of the payload with which the seq was used, None for every other answer."""
    match reply:
        case [b"conflict", b"payload", bytes(digest)]:
            return digest.decode()
        case _:
            return None


def refusal(reply: Sequence[bytes | int], owner: OwnerId, seq: int | None, limits: Limits) -> GradstreamError:
    """The error that a script's answer other than ok stands for."""
    verdict, *details = [str(part) if isinstance(part, int) else part.decode() for part in reply]
    match verdict:
        case "unknown":
            return UnknownModel(f"there is no model {owner}; create one first")
        case "closed":
            return UnknownModel(f"model {owner} was unloaded; create a new one or load a checkpoint")
        case "behind":
            return Unavailable(
                f"{owner}: the server is recovering: the queue does not have all of the model's jobs back yet; send it again in a few seconds"
            )
        case "conflict":
            if seq is None:
                return SequenceConflict(f"{owner} exists already")
            return SequenceConflict(f"seq_id {seq_text(seq)} of {owner} {_CONFLICTS[details[0]]}")
        case "full":
            budget, used, limit, retry_ms = details
            retry_after_s = min(max(float(retry_ms) / 1000, limits.min_retry_after_s), limits.max_retry_after_s)
            text = _BUDGETS[budget].format(used=used, limit=limit)
            return QueueFull(f"{owner}: {text}; try again in {retry_after_s:.0f} s", retry_after_s=retry_after_s)
        case _:
            raise AssertionError(f"unexpected answer of a job log script: {verdict} {details}")
