"""Builders of jobs for tests of the worker."""

from gradstream.shared import codec, ids
from gradstream.shared.ids import ModelId, OwnerId
from gradstream.shared.joblog.port import LogEntry
from gradstream.shared.wire import Job, UnloadModel

_PAYLOAD = codec.encode(UnloadModel())


def job(owner: str, seq: int, op: str, *, num_tokens: int = 0, payload: bytes = _PAYLOAD, tenant: str = "local") -> Job:
    """A job with a payload that no test of planning looks into."""
    return Job(
        future_id=ids.future_id(ModelId(owner), seq),
        owner=ModelId(owner),
        seq=seq,
        op=op,
        tenant=ids.TenantId(tenant),
        payload=payload,
        num_tokens=num_tokens,
    )


def queues(*jobs: Job) -> dict[OwnerId, list[Job]]:
    """The jobs by owner, owners in order of their first job."""
    by_owner: dict[OwnerId, list[Job]] = {}
    for one in jobs:
        by_owner.setdefault(one.owner, []).append(one)
    return by_owner


def entry(number: int, one: Job, *, is_open: bool = True, starts: int = 0) -> LogEntry:
    """The job as the log's entry `number`-0."""
    return LogEntry(entry_id=f"{number}-0", job=one, is_open=is_open, starts=starts)
