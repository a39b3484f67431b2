"""The log on disk as rows: a job with what became of it, or a batch with its jobs."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import FutureId, future_parts
from gradstream.shared.wire import Outcome
from gradstream.worker.disklog.frames import Dropped, LoggedBatch, LoggedJob, LoggedOutcome, Started, Stopped
from gradstream.worker.disklog.framing import AnyFrame
from gradstream.worker.inspect.describe import in_short, loss_of

OPEN = "open"
DROPPED = "dropped"
FAILED = "failed"


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    """One job. status: done, failed, open, or dropped (cancelled before it ran).

    at_ms: when it was accepted; done_ms: when its batch was logged; batch_ms: how long that ran. tokens, tenant and at_ms are None when
    the job itself is not in this log any more. epochs: of the gangs that began it and did not stop in order.
    """

    future_id: FutureId
    op: str
    owner: str
    tenant: str | None
    status: str
    at_ms: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    batch: str | None = None
    done_ms: int | None = None
    batch_ms: float | None = None
    loss: float | None = None
    result: str = ""
    digest: str | None = None
    epochs: list[int] = []


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. loss_sum: of its jobs' losses, None when none reported one. digest: over its outcomes' digests in order.

    is_partial: an export left out jobs of it.
    """

    batch: str
    kind: str
    done_ms: int
    batch_ms: float
    num_jobs: int
    num_failed: int
    tokens: int
    owners: list[str]
    tenants: list[str]
    cursor: str
    loss_sum: float | None
    digest: str
    is_partial: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """A job at its end, or open at the log's end. Its outcome is decoded only when a row is made of it."""

    future_id: FutureId
    job: LoggedJob | None
    epochs: Sequence[int]
    status: str
    batch: LoggedBatch | None = None
    outcome: LoggedOutcome | None = None

    @property
    def op(self) -> str:
        if self.job is not None:
            return self.job.job.op
        return "?" if self.batch is None else self.batch.plan.kind

    @property
    def owner(self) -> str:
        return future_parts(self.future_id).owner

    @property
    def tenant(self) -> str | None:
        return None if self.job is None else self.job.job.tenant

    @property
    def at_ms(self) -> int:
        """When it ended, for an open one when it came."""
        if self.batch is not None:
            return self.batch.at_ms
        return 0 if self.job is None else self.job.at_ms

    def row(self) -> JobRow:
        """The row, with the outcome read."""
        outcome = None if self.outcome is None else decoded(self.outcome.data)
        job, batch = self.job, self.batch
        return JobRow(
            future_id=self.future_id,
            op=self.op,
            owner=self.owner,
            tenant=self.tenant,
            status=self.status,
            at_ms=None if job is None else job.at_ms,
            tokens=None if job is None else job.job.num_tokens,
            bytes=None if job is None else len(job.job.payload),
            batch=None if batch is None else str(batch.batch_id),
            done_ms=None if batch is None else batch.at_ms,
            batch_ms=None if batch is None else batch.elapsed_ms,
            loss=None if outcome is None else loss_of(outcome),
            result="" if outcome is None else in_short(outcome),
            digest=None if self.outcome is None else self.outcome.digest,
            epochs=sorted(set(self.epochs)),
        )


@dataclass(slots=True)
class JobPairer:
    """Pairs jobs with their ends over frames that come bit by bit. Holds the open jobs only."""

    _open: dict[FutureId, LoggedJob] = field(default_factory=dict)
    _starts: dict[FutureId, list[int]] = field(default_factory=dict)

    def take(self, frame: AnyFrame) -> list[JobEnd]:
        """The jobs that end with this frame, in order."""
        match frame:
            case LoggedJob():
                self._open.setdefault(frame.job.future_id, frame)
            case Started():
                for future_id in frame.future_ids:
                    self._starts.setdefault(future_id, []).append(frame.epoch)
            case Stopped():
                for future_id in frame.future_ids:
                    epochs = self._starts.get(future_id, [])
                    self._starts[future_id] = [epoch for epoch in epochs if epoch != frame.epoch]
            case Dropped():
                return [self._end(future_id, DROPPED) for future_id in frame.future_ids]
            case LoggedBatch():
                return [
                    self._end(outcome.future_id, outcome.status.value, batch=frame, outcome=outcome)
                    for outcome in frame.outcomes
                ]
            case _:
                pass
        return []

    def still_open(self) -> list[JobEnd]:
        """The jobs that have not ended, in the order of the log."""
        return [
            JobEnd(future_id=future_id, job=job, epochs=self._starts.get(future_id, []), status=OPEN)
            for future_id, job in self._open.items()
        ]

    def _end(
        self,
        future_id: FutureId,
        status: str,
        *,
        batch: LoggedBatch | None = None,
        outcome: LoggedOutcome | None = None,
    ) -> JobEnd:
        job = self._open.pop(future_id, None)
        epochs = self._starts.pop(future_id, [])
        return JobEnd(future_id=future_id, job=job, epochs=epochs, status=status, batch=batch, outcome=outcome)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which jobs a list shows; None and false: any."""

    model: str | None = None
    op: str | None = None
    tenant: str | None = None
    since_ms: int = 0
    failed: bool = False
    is_open: bool = False

    def takes(self, ended: JobEnd) -> bool:
        return (
            (self.model is None or ended.owner == self.model)
            and (self.op is None or ended.op == self.op)
            and (self.tenant is None or ended.tenant == self.tenant)
            and ended.at_ms >= self.since_ms
            and (not self.failed or ended.status == FAILED)
            and (not self.is_open or ended.status == OPEN)
        )


def jobs_in(frames: Iterable[AnyFrame], wanted: Wanted) -> Iterator[JobEnd]:
    """The wanted jobs: ended ones in the order of their ends, then the open ones."""
    pairer = JobPairer()
    for frame in frames:
        for ended in pairer.take(frame):
            if wanted.takes(ended):
                yield ended
    for ended in pairer.still_open():
        if wanted.takes(ended):
            yield ended


def batches_in(frames: Iterable[AnyFrame], wanted: Wanted) -> Iterator[tuple[LoggedBatch, list[JobEnd]]]:
    """The batches that ended a wanted job, with all the jobs that ended."""
    pairer = JobPairer()
    for frame in frames:
        ended = pairer.take(frame)
        if isinstance(frame, LoggedBatch) and any(map(wanted.takes, ended)):
            yield frame, ended


def batch_row(batch: LoggedBatch, ended: Sequence[JobEnd]) -> BatchRow:
    """The row of a batch, with the outcomes read."""
    rows = [one.row() for one in ended]
    losses = [row.loss for row in rows if row.loss is not None]
    return BatchRow(
        batch=str(batch.batch_id),
        kind=batch.plan.kind,
        done_ms=batch.at_ms,
        batch_ms=batch.elapsed_ms,
        num_jobs=len(rows),
        num_failed=sum(row.status == FAILED for row in rows),
        tokens=sum(row.tokens or 0 for row in rows),
        owners=sorted({row.owner for row in rows}),
        tenants=sorted({row.tenant for row in rows if row.tenant is not None}),
        cursor=batch.cursor,
        loss_sum=sum(losses) if losses else None,
        digest=codec.digest(" ".join(outcome.digest for outcome in batch.outcomes).encode()),
        is_partial=batch.partial,
    )


def decoded(data: bytes) -> Outcome | None:
    """The outcome in data, None when this version does not know it."""
    try:
        return codec.decode_outcome(data)
    except InvalidRequest:
        return None
