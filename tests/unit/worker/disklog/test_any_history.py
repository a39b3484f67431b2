"""Any history of appends, deaths, power cuts, late gangs, take-overs and retention reads as what should be left of it."""

import os
import shutil
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.support.disklog import batch, entry, future, last_segment, open_writer

from gradstream.shared.clock import ManualClock
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import Fenced
from gradstream.worker.disklog import framing
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
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.retention import retain
from gradstream.worker.disklog.verify import verify
from gradstream.worker.disklog.writer import DiskLogWriter

pytestmark = pytest.mark.usefixtures("no_fsync")

_SEGMENT_BYTES = 600


class Histories(RuleBasedStateMachine):
    """The model is a plain list: what a log without files would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.written: list[tuple[Position, Frame]] = []
        self.zombies: list[tuple[int, DiskLogWriter]] = []
        self.epoch = 1
        self.next_job = 1
        self.next_batch = 1
        self.writer: DiskLogWriter

    def teardown(self) -> None:
        for _, writer in self.zombies:
            writer.close()
        self.writer.close()
        shutil.rmtree(self.directory)

    @initialize()
    def first_gang(self) -> None:
        self.writer = open_writer(self.directory, segment_bytes=_SEGMENT_BYTES)

    @rule(num_jobs=st.integers(min_value=1, max_value=3), size=st.integers(min_value=0, max_value=3000))
    def log_jobs(self, num_jobs: int, size: int) -> None:
        entries = [entry(self.next_job + i, payload=os.urandom(size)) for i in range(num_jobs)]
        self.next_job += num_jobs
        positions = self.writer.append_jobs(entries)
        for item in entries:
            frame = LoggedJob(entry_id=item.entry_id, at_ms=item.at_ms, job=item.job)
            self.written.append((positions[item.job.future_id], frame))

    @rule(data=st.data())
    def start_jobs(self, data: st.DataObject) -> None:
        future_ids = self._some(data)
        before = self.writer.position()
        self.writer.append_started(self.next_batch, future_ids)
        self._add(before, Started(epoch=self.epoch, number=self.next_batch, future_ids=future_ids))

    @rule(data=st.data())
    def end_jobs(self, data: st.DataObject) -> None:
        frame = batch(self.next_batch, self._some(data), epoch=self.epoch)
        self.next_batch += 1
        self.written.append((self.writer.append_batch(frame), frame))

    @rule(data=st.data())
    def stop_or_drop_jobs(self, data: st.DataObject) -> None:
        future_ids = self._some(data)
        before = self.writer.position()
        if data.draw(st.booleans()):
            self.writer.append_stopped(future_ids)
            self._add(before, Stopped(epoch=self.epoch, future_ids=future_ids))
        else:
            self.writer.append_dropped(future_ids)
            self._add(before, Dropped(future_ids=future_ids))

    @rule(data=st.data(), dies=st.booleans())
    def take_over(self, data: st.DataObject, *, dies: bool) -> None:
        """The gang dies in a write, or lives on without its lease; another one follows."""
        if dies:
            self.writer.close()
            frame = framing.pack(batch(99, [future(0)]), salt=1)
            with last_segment(self.directory).open("ab") as file:
                file.write(frame[: data.draw(st.integers(min_value=0, max_value=len(frame) - 1))])
        else:
            self.zombies.append((self.epoch, self.writer))
        self._succeed()

    @rule(data=st.data())
    def power_cut(self, data: st.DataObject) -> None:
        """The last segment loses what it had not synced: anything behind its head."""
        self.writer.close()
        path = last_segment(self.directory)
        bounds = [position.offset for position, _ in DiskLog(self.directory).scan() if position.segment == path.name]
        bounds.append(path.stat().st_size)
        size = data.draw(st.integers(min_value=bounds[1], max_value=bounds[-1]))
        os.truncate(path, size)
        kept = max(bound for bound in bounds if bound <= size)
        self.written = [
            (position, frame)
            for position, frame in self.written
            if position.segment != path.name or position.offset < kept
        ]
        self._succeed()

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def zombie_writes(self, data: st.DataObject) -> None:
        epoch, zombie = data.draw(st.sampled_from(self.zombies))
        with suppress(Fenced):
            zombie.append_started(1000, [future(1000)])
            zombie.append_batch(batch(self.next_batch + 1000, [future(1000)], epoch=epoch))
        self.next_batch += 1

    @precondition(lambda self: self.written)
    @rule(data=st.data())
    def retain_from_some_frame(self, data: st.DataObject) -> None:
        before, _ = data.draw(st.sampled_from(self.written))
        max_bytes = data.draw(st.sampled_from([0, 4000]))
        removed = retain(self.directory, before=before, max_bytes=max_bytes, max_age_s=1e9, clock=ManualClock())
        assert all(name < before.segment for name in removed)
        self.written = [item for item in self.written if item[0].segment not in removed]

    @invariant()
    def log_reads_as_the_model(self) -> None:
        log = DiskLog(self.directory)
        assert [item for item in log.scan() if not isinstance(item[1], SegmentHead)] == self.written
        tail = log.tail()
        assert tail.end == self.writer.position()
        assert {future_id: position for future_id, (position, _) in tail.open_jobs.items()} == self._open()
        assert tail.starts == self._starts()
        assert verify(self.directory).is_sound

    def _succeed(self) -> None:
        tail = DiskLog(self.directory).tail()
        self.epoch = tail.epoch + 1
        self.writer = open_writer(
            self.directory,
            epoch=self.epoch,
            after=tail.end,
            known_open=tail.open_jobs.keys(),
            segment_bytes=_SEGMENT_BYTES,
        )

    def _add(self, before: Position, frame: Frame) -> None:
        """The frame stands where the writer was, or first in the segment that it began."""
        position, found = list(DiskLog(self.directory).scan(before))[-1]
        assert found == frame
        self.written.append((position, frame))

    def _some(self, data: st.DataObject) -> list[FutureId]:
        open_jobs = sorted(self._open())
        return data.draw(st.lists(st.sampled_from(open_jobs), unique=True, max_size=3)) if open_jobs else []

    def _open(self) -> dict[FutureId, Position]:
        jobs: dict[FutureId, Position] = {}
        for position, frame in self.written:
            match frame:
                case LoggedJob():
                    jobs[frame.job.future_id] = position
                case LoggedBatch():
                    for outcome in frame.outcomes:
                        jobs.pop(outcome.future_id, None)
                case Dropped():
                    for future_id in frame.future_ids:
                        jobs.pop(future_id, None)
                case _:
                    pass
        return jobs

    def _starts(self) -> dict[FutureId, set[int]]:
        starts = defaultdict(set)
        for _, frame in self.written:
            if isinstance(frame, Started):
                for future_id in frame.future_ids:
                    starts[future_id].add(frame.epoch)
            if isinstance(frame, Stopped):
                for future_id in frame.future_ids:
                    starts[future_id].discard(frame.epoch)
        return {future_id: epochs for future_id, epochs in starts.items() if future_id in self._open() and epochs}


TestAnyHistory = Histories.TestCase
TestAnyHistory.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
