"""Everything that the log knows of one job or of one batch."""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.frames import LoggedBatch, SegmentHead, Started
from gradstream.worker.disklog.framing import AnyFrame
from gradstream.worker.inspect.describe import Plain, describe, describe_payload
from gradstream.worker.inspect.log_rows import JobEnd, JobPairer, decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is shown, and the job's body, which is empty for a batch."""

    shown: dict[str, Plain]
    payload: bytes = b""


def find_job(frames: Iterable[AnyFrame], future_id: FutureId) -> Found | None:
    """A job with its payload in short, its plan, its outcome and metrics; None when the log does not have it."""
    pairer = JobPairer()
    starts: list[Plain] = []
    fingerprint = ""
    found: JobEnd | None = None
    for frame in frames:
        if isinstance(frame, SegmentHead):
            fingerprint = frame.fingerprint
        if isinstance(frame, Started) and future_id in frame.future_ids:
            starts.append(f"{frame.epoch}-{frame.number}")
        found = next((one for one in pairer.take(frame) if one.future_id == future_id), None)
        if found is not None:
            break
    else:
        found = next((one for one in pairer.still_open() if one.future_id == future_id), None)
    if found is None:
        return None
    shown: dict[str, Plain] = {"job": _row(found), "started_as_batch": starts}
    if found.job is not None:
        job = found.job.job
        shown["accepted"] = {"entry_id": found.job.entry_id, "seq": job.seq, "ordered": found.job.ordered, "v": job.v}
        shown["payload"] = describe_payload(job.payload)
    if found.batch is not None:
        shown["batch"] = {**_batch(found.batch), "fingerprint": fingerprint}
        if (source := found.batch.sources.get(future_id)) is not None:
            shown["source_digest"] = source
    if found.outcome is not None:
        shown["outcome"] = describe(decoded(found.outcome.data))
    return Found(shown=shown, payload=b"" if found.job is None else found.job.job.payload)


def find_batch(frames: Iterable[AnyFrame], batch_id: BatchId) -> Found | None:
    """A batch with its plan, its jobs and the records that it changed; None when the log does not have it."""
    pairer = JobPairer()
    fingerprint = ""
    for frame in frames:
        ended = pairer.take(frame)
        if isinstance(frame, SegmentHead):
            fingerprint = frame.fingerprint
        if isinstance(frame, LoggedBatch) and frame.batch_id == batch_id:
            records: list[Plain] = [
                {"record": f"{record.kind}:{record.record_id}", "fields": describe(record.fields)}
                for record in frame.records
            ]
            return Found(
                shown={
                    "batch": {**_batch(frame), "fingerprint": fingerprint},
                    "jobs": [_row(one) for one in ended],
                    "records": records,
                    "sources": describe(dict(frame.sources)),
                }
            )
    return None


def _batch(batch: LoggedBatch) -> dict[str, Plain]:
    return {
        "id": str(batch.batch_id),
        "logged_ms": batch.at_ms,
        "elapsed_ms": batch.elapsed_ms,
        "cursor": batch.cursor,
        "partial": batch.partial,
        "plan": {**_fields(batch.plan), "future_ids": list(batch.plan.future_ids)},
    }


def _row(ended: JobEnd) -> Plain:
    return _fields(ended.row())


def _fields(value: msgspec.Struct) -> dict[str, Plain]:
    return {name: describe(getattr(value, name)) for name in value.__struct_fields__}
