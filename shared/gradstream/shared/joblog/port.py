"""What the API and the worker see of the job log: two ports and the values that cross them."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from gradstream.shared import codec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.ids import FutureId, ModelId, OwnerId, SamplerId, TenantId
from gradstream.shared.joblog.packed import Packed
from gradstream.shared.joblog.vitals import Vitals
from gradstream.shared.wire import Failed, Job, Outcome


class FutureStatus(StrEnum):
    """held: its seq is ahead of the model's next one. queued: in the log. done and failed: it has an outcome."""

    HELD = "held"
    QUEUED = "queued"
    DONE = "done"
    FAILED = "failed"


class RecordKind(StrEnum):
    """Redis hashes that describe things, beside the jobs; written whole or field by field."""

    MODEL = "model"
    SAMPLER = "sampler"
    SESSION = "session"
    CHECKPOINT = "checkpoint"
    STORAGE = "storage"
    EXPORT = "export"
    ENDPOINT = "endpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job on its way in.

    ordered jobs belong to a model and run in seq order; the others (samples) only use seq for their future's id.
    model_record is given by jobs that make a model (seq 0): fields of the model's record; the record must not exist yet
    (the same submission again is the same future).

    seq None: the server numbers this model's jobs in the order of their arrival, without a gap. Then the same object submitted again is
    the same job. So is one with the same retry_key and payload for Limits.retry_window_s, unless its request arrived after somebody
    had asked for that job's outcome, or after the life of the model that the job belonged to; without a retry_key each submission is a job
    of its own. retry_digest stands for the payload there, where the same request does not always give the same one. A model may be made
    again behind its unload, or after it failed or was lost; its seqs go on. age_ms: how long ago the client's request arrived.

    packed: the payload as it will be stored, where whoever encoded it in a thread packed it there too.
    """

    owner: OwnerId
    seq: int | None
    op: str
    tenant: TenantId
    payload: bytes
    num_tokens: int = 0
    ordered: bool = True
    model_record: Mapping[str, str] | None = None
    retry_key: str = ""
    retry_digest: str = ""
    age_ms: int = 0
    packed: Packed | None = None
    call: str = field(default_factory=lambda: secrets.token_hex(16), repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The answer to a submission. is_duplicate: this very job had been accepted before."""

    future_id: FutureId
    status: FutureStatus
    is_duplicate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FutureView:
    """A future as stored. outcome is set when status is done or failed. waiting_for_seq is set when status is held."""

    future_id: FutureId
    op: str
    tenant: TenantId
    status: FutureStatus
    outcome: bytes | None = None
    waiting_for_seq: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Some records of a list by id, newest first, and how many the whole list has."""

    records: Mapping[str, Mapping[str, str]]
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A sample that is done or failed. num_bytes: of its outcome as stored."""

    future_id: FutureId
    is_failed: bool
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Samples of one client in the order in which they ended; cursor is where to go on."""

    items: Sequence[Completion]
    cursor: int


class Intake(Protocol):
    """The API's side of the job log. Async; safe for many tasks at once."""

    async def submit(self, submission: Submission) -> Receipt:
        """Accept a job atomically, or raise and change nothing.

        Raises UnknownModel (no such model, or another tenant's), SequenceConflict (seq used with another payload, or by a
        refused request), QueueFull (a budget is exhausted; held jobs count), and for a job that the server numbers Unavailable while
        the queue lacks jobs that this intake knows of, and no gang took over since.
        """
        ...

    async def refuse(self, *, model: ModelId, seq: int, tenant: TenantId) -> None:
        """Count seq as used by a request that was refused, so that later jobs do not wait for it. Idempotent."""
        ...

    async def future(self, future_id: FutureId) -> FutureView | None:
        """The future as it is now, or None when there is none (never was, or expired)."""
        ...

    async def wait(self, future_id: FutureId, *, timeout_s: float, tenant: TenantId | None = None) -> FutureView | None:
        """The future as soon as it is done or failed, else as it is after timeout_s. Wakes on the note stream.

        Only for a future of the tenant, if one is given: any other is told as it is, at once.
        """
        ...

    async def completions(self, sampler: SamplerId, block: int, *, after: int, timeout_s: float) -> Completions:
        """Samples that ended after a cursor (0: from the first that is kept), of one client's block of 10**9 seqs.

        Waits up to timeout_s for the first one. Those at or before the cursor are forgotten.
        """
        ...

    async def cancel(self, future_id: FutureId, *, tenant: TenantId) -> bool:
        """Fail a sample that has not started; True when this call did. Any other future stays as it is."""
        ...

    def mark_delivered(self, future_id: FutureId) -> None:
        """Shorten a delivered result's life to the after-delivery time, some moments later.

        Nobody waits for it and nothing is raised: with the queue away the result only lives longer.
        """
        ...

    async def note_polled(self, future_id: FutureId, *, tenant: TenantId) -> None:
        """Note that the tenant's client knows this future: the same request is a new one if it arrives after this."""
        ...

    async def put_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> None:
        """Set fields of a record, making it if needed."""
        ...

    async def add_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> bool:
        """Make a record unless it exists; True when this call made it."""
        ...

    async def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        """All fields of a record, or None."""
        ...

    async def change_record(self, kind: RecordKind, record_id: str, fields: Mapping[str, str]) -> bool:
        """Set fields of a record unless it is gone; True when they were set."""
        ...

    async def swap_field(self, kind: RecordKind, record_id: str, field: str, *, old: str, new: str) -> bool:
        """Set a record's field from old ('' where it has none) to new; True when it is new now, also when it was before.

        False when it is neither, as somebody changed it since, or the record is gone.
        """
        ...

    async def remove_record(self, kind: RecordKind, record_id: str, *, created_ms: str = "") -> bool:
        """Remove a record, if created_ms is given only the one made then; True when this call removed it.

        A model's record stays while the model takes jobs or has open ones.
        """
        ...

    async def list_tenant(self, kind: RecordKind, tenant: TenantId, *, offset: int, limit: int) -> Page:
        """Records of a tenant."""
        ...

    async def list_children(self, kind: RecordKind, parent: str, *, offset: int, limit: int) -> Page:
        """Models or samplers of a session, checkpoints of a model. Whose the parent is, is for the caller to check."""
        ...

    async def num_children(self, kind: RecordKind, parents: Sequence[str]) -> list[int]:
        """How many records of the kind each parent has."""
        ...

    async def count_up(self, kind: RecordKind, record_id: str, field: str) -> int:
        """The record's counter after it was counted up by one; 0 when there is no record. A retry may skip a number."""
        ...

    async def put_link(self, token: str, target: str, *, ttl_s: int) -> None:
        """Keep what a download's token stands for, for ttl_s seconds."""
        ...

    async def link(self, token: str) -> str | None:
        """What a token stands for, None when there is none or its time is over."""
        ...

    async def card(self) -> EngineCard | None:
        """The card of the engine behind this queue, None before the first worker was ready."""
        ...

    async def is_worker_alive(self) -> bool:
        """True while a gang holds the lease."""
        ...

    async def leading(self) -> int | None:
        """The epoch of the gang that leads: it holds the lease, and has published its card, which it does once it restored everything.

        None while there is none, also while a gang takes over.
        """
        ...

    async def vitals(self, tenant: TenantId) -> Vitals:
        """Signs of life of the engine and the state of its queue; how many of the open jobs are the tenant's."""
        ...

    async def fail_gaps(self) -> int:
        """Fail jobs held longer than hold_timeout_s with SequenceGap; how many. Idempotent, any replica may call it.

        The missing seqs count as used afterwards, so that the model goes on.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """A job as read from the log. entry_id is the stream's id; is_open says that it had no outcome yet when it was read.

    starts: how many gangs had marked it as started; more than one run without an outcome makes it a suspect. ordered: it has a
    place in its model's order. at_ms: when it was accepted. again: the name by which a repetition of its request is found. record: the
    fields of the model's record that it makes. frame: the payload as a zstd frame, when it was stored as one; else empty.
    """

    entry_id: str
    job: Job
    is_open: bool = True
    starts: int = 0
    ordered: bool = True
    at_ms: int = 0
    again: str = ""
    record: Mapping[str, str] = field(default_factory=dict)
    frame: bytes = field(default=b"", repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordWrite:
    """Fields to set on a record, or its removal when fields is None, in the same commit as an outcome."""

    kind: RecordKind
    record_id: str
    fields: Mapping[str, str] | None


class BatchId(NamedTuple):
    """The place of a batch in the journal: numbers start at 1 in each epoch."""

    epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"

    @classmethod
    def parse(cls, text: str) -> "BatchId":
        """The batch of a text like 3-17; raises ValueError."""
        epoch, number = text.split("-")
        return cls(int(epoch), int(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A job with its outcome as it is stored. data: msgpack; digest: of data."""

    job: Job
    status: FutureStatus
    data: bytes
    digest: str

    @classmethod
    def of(cls, job: Job, outcome: Outcome) -> "Ended":
        data = codec.encode(outcome)
        status = FutureStatus.FAILED if isinstance(outcome, Failed) else FutureStatus.DONE
        return cls(job=job, status=status, data=data, digest=codec.digest(data))


@dataclass(frozen=True, slots=True, kw_only=True)
class Covered:
    """Up to where a kept snapshot makes the log and the journal dispensable: a batch, and the log entry before its oldest open job."""

    batch: BatchId
    entry_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Everything that becomes visible when a batch is done.

    outcomes: in execution order. cursor: the entry id before the oldest entry that has no outcome after this commit.
    plan: msgpack of the Plan, as journaled. batch: None is (epoch, number); a take-over gives the earlier epoch's batch that it makes up
    for. Nothing is trimmed that covered does not cover. sources: by future, a digest of the checkpoint that a load_weights read. at_ms:
    when the batch ended; elapsed_ms: how long it took. context: records that others wrote and that belong to the jobs; they are put
    into the log on disk and are not written. after: the batch that the journal must end with before this one, None: not checked.
    """

    epoch: int
    number: int
    outcomes: Sequence[Ended]
    plan: bytes
    cursor: str
    records: Sequence[RecordWrite] = field(default_factory=tuple)
    context: Sequence[RecordWrite] = field(default_factory=tuple)
    batch: BatchId | None = None
    covered: Covered | None = None
    sources: Mapping[FutureId, str] = field(default_factory=dict)
    at_ms: int = 0
    elapsed_ms: float = 0.0
    after: BatchId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Journaled:
    """A committed batch as Redis still has it. entries and ended: its jobs and outcomes in execution order, those left out that are
    gone from Redis; num_gone says how many.
    """

    batch: BatchId
    plan: bytes
    entries: Sequence[LogEntry]
    ended: Sequence[Ended]
    num_gone: int
    at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """needless: models that the gang holds and that are unloaded or gone. lost: every lost model on record."""

    needless: Sequence[ModelId]
    lost: Sequence[ModelId]


class Fenced(Exception):
    """Another gang holds a newer epoch. The holder of this one must stop at once and change nothing more."""


class TailLost(Exception):
    """Redis was put back in time: it lacks what this gang had read or committed. The gang must end; its successor makes up for it."""


class Feed(Protocol):
    """Rank 0's side of the job log. Blocking; several threads may use it, each call on a connection of its own."""

    def acquire(self, *, owner: str, above: int = 0) -> int:
        """The new epoch, higher than every one before and than above.

        The same owner may take over its own lease; another owner's live lease raises Unavailable.
        """
        ...

    def renew(self, epoch: int) -> None:
        """Prolong the lease, and put the published card back if somebody deleted it. Raises Fenced. May be called from its own thread and connection."""
        ...

    def release(self, epoch: int) -> None:
        """Give the lease back on a clean stop."""
        ...

    def cursor(self) -> str:
        """Where reading must start so that every open job is seen."""
        ...

    def read(self, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        """Entries after an id, with their payloads, oldest first; empty when none came within block_ms."""
        ...

    def newest_entry(self) -> int:
        """The number of the newest entry ever put into the log, 0 before the first one."""
        ...

    def mark_started(self, future_ids: Sequence[FutureId], *, epoch: int) -> list[FutureId]:
        """Count that this epoch runs these open jobs, before it does. Once per epoch and job. Raises Fenced.

        Returns those that were cancelled, which need not run.
        """
        ...

    def mark_stopped(self, future_ids: Sequence[FutureId], *, epoch: int) -> None:
        """Take back this epoch's mark on jobs that it leaves undone on a clean stop: that they ran says nothing against them.

        Idempotent. Raises Fenced.
        """
        ...

    def note_running(self, number: int, op: str, future_ids: Sequence[FutureId], *, epoch: int) -> None:
        """Say what the gang runs now, for people who look. Raises Fenced."""
        ...

    def record(self, kind: RecordKind, record_id: str) -> dict[str, str] | None:
        """All fields of a record, or None."""
        ...

    def commit(self, commit: Commit) -> None:
        """Record outcomes, journal entry, records, applied positions and cursor in one step, and wake the waiters.

        Idempotent: the same commit again changes nothing. Raises Fenced, TailLost.
        """
        ...

    def publish_card(self, card: EngineCard, *, epoch: int) -> None:
        """Replace the engine's card. Raises Fenced."""
        ...

    def adopt(
        self, models: Sequence[ModelId], *, lost: Mapping[ModelId, str], otherwise: str = "", epoch: int
    ) -> Adoption:
        """Say which models this gang holds; every other one that was ready is marked lost here. Raises Fenced.

        lost: the reasons of single models; otherwise: that of the rest.
        """
        ...

    def name_snapshot(self, snapshot: Mapping[str, str], *, epoch: int) -> None:
        """Name the newest snapshot. Raises Fenced, so that the holder of an older epoch removes nothing."""
        ...

    def last_batch(self) -> BatchId | None:
        """The newest batch in the journal, None when nothing was ever committed."""
        ...

    def restore(self, entry: LogEntry, *, epoch: int, ended_ms: int = 0) -> bool:
        """Put a job back that a lost Redis had accepted, an open one to be read again; True when it was missing. Raises Fenced.

        ended_ms: of an executed one, when its batch ended; one that ended so long ago that nobody can ask for its outcome any more
        leaves only its place in its model's order.
        """
        ...

    def unknown(self, future_ids: Sequence[FutureId]) -> set[FutureId]:
        """Those of these futures that Redis does not have."""
        ...

    def expel(self, entries: Sequence[LogEntry], *, epoch: int) -> set[FutureId]:
        """Fail the open jobs that have the seqs of these ones and are others; the futures that are not these jobs'. Raises Fenced.

        A Redis that was put back in time may have given seqs out once more.
        """
        ...

    def restore_record(self, write: RecordWrite, *, epoch: int, made_by: int | None = None) -> bool:
        """Put a record back that a lost Redis had; True when there was none. Raises Fenced.

        made_by: of a model's record, the seq of the job that made the model with it; it replaces that of an earlier creation.
        """
        ...

    def journaled(self, after: BatchId, *, count: int) -> list[Journaled]:
        """The next batches of the journal, oldest first."""
        ...
