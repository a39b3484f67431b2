"""What the log says at its end: open jobs, who was running, where it goes on."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.frames import (
    Dropped,
    Frame,
    LoggedBatch,
    LoggedJob,
    Position,
    SegmentHead,
    Started,
    Stopped,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """The state at the end of the log.

    last: the newest batch. end: where a successor's log goes on, None for an empty log. open_jobs: jobs without an outcome, in the order
    of the log. starts: for each of these the epochs that began to run it and did not stop in order. epoch: the highest of any segment,
    also of one that does not count. last_entry: the highest number of an entry of the stream of jobs. fingerprint: of the newest gang.
    """

    last: BatchId | None
    end: Position | None
    open_jobs: Mapping[FutureId, tuple[Position, LoggedJob]]
    starts: Mapping[FutureId, frozenset[int]]
    epoch: int
    last_entry: int
    fingerprint: str | None


def entry_number(entry_id: str) -> int:
    """The number of an entry of the stream of jobs, whose ids are 1-0, 2-0 and so on; 0 for the place before the first."""
    return int(entry_id.partition("-")[0])


class TailBuilder:
    """Takes the frames of the log in order; holds no more than the open jobs."""

    def __init__(self) -> None:
        self._last: BatchId | None = None
        self._open: dict[FutureId, tuple[Position, LoggedJob]] = {}
        self._starts: defaultdict[FutureId, set[int]] = defaultdict(set)
        self._last_entry = 0
        self._fingerprint: str | None = None

    def take(self, position: Position, frame: Frame) -> None:
        """Count one frame in."""
        match frame:
            case SegmentHead():
                self._fingerprint = frame.fingerprint
            case LoggedJob():
                self._last_entry = max(self._last_entry, entry_number(frame.entry_id))
                self._open.setdefault(frame.job.future_id, (position, frame))
            case Started():
                for future_id in frame.future_ids:
                    self._starts[future_id].add(frame.epoch)
            case Stopped():
                for future_id in frame.future_ids:
                    self._starts[future_id].discard(frame.epoch)
            case Dropped():
                self._end(frame.future_ids)
            case LoggedBatch():
                self._last = frame.batch_id
                self._last_entry = max(self._last_entry, entry_number(frame.cursor))
                self._end(outcome.future_id for outcome in frame.outcomes)

    def build(self, *, end: Position | None, epoch: int) -> Tail:
        """The state after all frames so far."""
        starts = {future_id: frozenset(self._starts[future_id]) for future_id in self._open if self._starts[future_id]}
        return Tail(
            last=self._last,
            end=end,
            open_jobs=dict(self._open),
            starts=starts,
            epoch=epoch,
            last_entry=self._last_entry,
            fingerprint=self._fingerprint,
        )

    def _end(self, future_ids: Iterable[FutureId]) -> None:
        for future_id in future_ids:
            self._open.pop(future_id, None)
            self._starts.pop(future_id, None)
