"""Reads the log ahead of the leader in a thread, so that the next jobs are in memory when a batch ends."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from queue import Empty, SimpleQueue

import structlog

from gradstream.shared.errors import Unavailable
from gradstream.shared.joblog.port import Feed, LogEntry, TailLost

READ_COUNT = 64
READ_BLOCK_MS = 1000

_log = structlog.get_logger(__name__)


class LogReader:
    """Entries of the log from a cursor on, in order.

    At most max_bytes of payloads are held, plus one read: `release` makes room. log puts entries on disk before anybody sees them.
    """

    def __init__(self, feed: Feed, *, cursor: str, max_bytes: int, log: Callable[[Sequence[LogEntry]], None]) -> None:
        self._feed = feed
        self._log = log
        self._cursor = cursor
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._room = threading.Condition()
        self._closing = False
        self._inbox: SimpleQueue[list[LogEntry] | Exception] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="log-reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop reading; waits for the read in progress, at most READ_BLOCK_MS and some."""
        with self._room:
            self._closing = True
            self._room.notify_all()
        self._thread.join(timeout=2 * READ_BLOCK_MS / 1000)

    def get(self, *, timeout_s: float) -> list[LogEntry]:
        """Everything read so far; waits up to timeout_s for the first entry. Raises what broke the thread."""
        entries: list[LogEntry] = []
        try:
            item = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
            while True:
                if isinstance(item, Exception):
                    raise item
                entries.extend(item)
                item = self._inbox.get_nowait()
        except Empty:
            return entries

    def release(self, num_bytes: int) -> None:
        """Say that num_bytes of payloads are held no longer."""
        with self._room:
            self._held_bytes -= num_bytes
            self._room.notify_all()

    def _run(self) -> None:
        try:
            while self._wait_for_room():
                self._read()
        except Exception as error:  # noqa: BLE001 - the guard of a background task
            # The background-task guard: the leader raises it on its own thread.
            _log.exception("log_reader_failed")
            self._inbox.put(error)

    def _wait_for_room(self) -> bool:
        with self._room:
            self._room.wait_for(lambda: self._closing or self._held_bytes < self._max_bytes)
            return not self._closing

    def _read(self) -> None:
        try:
            entries = self._feed.read(self._cursor, count=READ_COUNT, block_ms=READ_BLOCK_MS)
            newest = None if entries else self._feed.newest_entry()
        except Unavailable as error:
            _log.warning("log_unreachable", reason=error.message)
            return
        if entries:
            self._log(entries)
            # What is on disk now as it came need not be kept in memory twice.
            entries = [replace(entry, frame=b"") if entry.frame else entry for entry in entries]
            self._cursor = entries[-1].entry_id
            with self._room:
                self._held_bytes += sum(len(entry.job.payload) for entry in entries)
            self._inbox.put(entries)
        if newest is not None and newest < int(self._cursor.partition("-")[0]):
            raise TailLost(f"the log in Redis ends at entry {newest}-0, and this gang has read up to {self._cursor}")
