"""What stands in the log: one type for each kind of frame.

A type changes only by adding a field with a default; golden bytes of old versions stay in the tests.
"""

import msgspec

from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, FutureStatus, RecordKind
from gradstream.shared.wire import Job, Plan

FORMAT_VERSION = 1


class Position(msgspec.Struct, frozen=True, order=True):
    """A place in the log: the name of a segment's file and a byte offset in it, where a frame starts or the segment ends."""

    segment: str
    offset: int


class SegmentHead(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="head"):
    """The first frame of a segment.

    after: where the log before this segment ends, None at the very start. Whatever older segments hold beyond it does not count: it
    was written by a gang that had already lost its lease, or torn by a kill. salt: goes into the checksums of the other frames,
    so that bytes of another file, or of a client's payload, never pass for a frame of this one.
    """

    version: int
    engine: str
    epoch: int
    index: int
    fingerprint: str
    created_ms: int
    salt: int
    after: Position | None = None


class LoggedJob(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="job"):
    """A job as rank 0 read it. entry_id: its id in the stream of jobs. at_ms: when it was accepted.

    again: the name by which a repetition of its request is found. record: the fields of the model's record that it makes.
    """

    entry_id: str
    at_ms: int
    job: Job
    ordered: bool = True
    again: str = ""
    record: dict[str, str] = {}


class PackedJob(msgspec.Struct, frozen=True, kw_only=True, tag="packed_job"):
    """A job whose payload came as a zstd frame, which stands here as it came. Readers get it as a LoggedJob.

    logged: the job without its payload.
    """

    logged: LoggedJob
    payload: bytes


class Started(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="started"):
    """The gang of this epoch is about to run these jobs as this batch."""

    epoch: int
    number: int
    future_ids: list[FutureId]


class Dropped(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="dropped"):
    """These jobs never ran: they were cancelled."""

    future_ids: list[FutureId]


class Stopped(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="stopped"):
    """The gang of this epoch stopped in order and left these jobs undone: its starts of them say nothing against them."""

    epoch: int
    future_ids: list[FutureId]


class LoggedOutcome(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a job. data: msgpack of its Outcome. digest: codec.digest of data."""

    future_id: FutureId
    status: FutureStatus
    digest: str
    data: bytes


class LoggedRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Fields set on a record, or its removal when fields is None."""

    kind: RecordKind
    record_id: str
    fields: dict[str, str] | None


class LoggedBatch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="batch"):
    """A batch that ran: its plan and all that became visible with it.

    outcomes: in execution order. cursor: the entry id before the oldest open entry after this batch. sources: for each load_weights, the
    digest of the checkpoint that it read. elapsed_ms: how long the gang took. partial: an export left out jobs of this batch that
    its plan names. context: records that others wrote and that a lost Redis would need again: a new model's, and its session's.
    """

    epoch: int
    number: int
    plan: Plan
    outcomes: list[LoggedOutcome]
    cursor: str
    at_ms: int
    records: list[LoggedRecord] = []
    sources: dict[FutureId, str] = {}
    elapsed_ms: float = 0.0
    partial: bool = False
    context: list[LoggedRecord] = []

    @property
    def batch_id(self) -> BatchId:
        return BatchId(self.epoch, self.number)


class Selection(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="selection"):
    """The first frame of an exported file: where it comes from and what was taken.

    owners: models and samplers whose jobs are in it, None for all; asked: those that were named, when neighbours came with them. start and
    stop: first and last batch asked for, as epoch-number; None is open. salt: as in SegmentHead.
    """

    version: int
    engine: str
    fingerprint: str
    created_ms: int
    salt: int
    owners: list[str] | None = None
    asked: list[str] | None = None
    start: str | None = None
    stop: str | None = None


class SelectionEnd(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="end"):
    """The last frame of an exported file, which without it is not whole. num_partial: of the batches, those marked partial."""

    num_jobs: int
    num_batches: int
    num_partial: int


Frame = SegmentHead | LoggedJob | Started | Dropped | Stopped | LoggedBatch
