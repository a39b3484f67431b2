"""Entries of the log reach the leader in order; a log that went back in time ends the gang."""

from collections.abc import Sequence
from typing import cast

import pytest

from gradstream.shared.ids import LOCAL_TENANT, ModelId, future_id
from gradstream.shared.joblog.port import Feed, LogEntry, TailLost
from gradstream.shared.wire import Job
from gradstream.worker.reader import LogReader


class Log:
    """A log of some entries; newest is the number that it says its newest entry has."""

    def __init__(self, entries: Sequence[LogEntry], *, newest: int) -> None:
        self._entries = entries
        self._newest = newest

    def read(self, after: str, *, count: int, block_ms: int) -> list[LogEntry]:
        del block_ms
        number = int(after.partition("-")[0])
        return [entry for entry in self._entries if int(entry.entry_id.partition("-")[0]) > number][:count]

    def newest_entry(self) -> int:
        return self._newest


def entry(number: int) -> LogEntry:
    owner = ModelId("s1:train:0")
    job = Job(
        future_id=future_id(owner, number), owner=owner, seq=number, op="optim_step", tenant=LOCAL_TENANT, payload=b"p"
    )
    return LogEntry(entry_id=f"{number}-0", job=job)


def reader(log: Log, *, cursor: str) -> LogReader:
    return LogReader(cast("Feed", log), cursor=cursor, max_bytes=1000, log=lambda _: None)


def read_on(reading: LogReader) -> None:
    while True:
        reading.get(timeout_s=120)


def test_a_log_that_ends_before_what_was_read_raises_where_the_leader_reads() -> None:
    reading = reader(Log([entry(4), entry(5)], newest=3), cursor="3-0")
    reading.start()
    with pytest.raises(TailLost, match="ends at entry 3-0, and this gang has read up to 5-0"):
        read_on(reading)
    reading.close()


def test_a_log_that_ends_with_what_was_read_is_waited_on() -> None:
    reading = reader(Log([entry(4)], newest=4), cursor="3-0")
    reading.start()
    seen = reading.get(timeout_s=120)
    reading.close()
    assert [one.job.seq for one in seen + reading.get(timeout_s=0)] == [4]
