"""Snapshots: copies that the leader takes between two batches, and the thread that writes them while the gang goes on."""

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from gradstream.engine.snapshot.cut import Cut, CutHead
from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import Clock
from gradstream.shared.errors import StorageFailure, Unavailable
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import BatchId, Covered
from gradstream.worker.disklog.frames import Position
from gradstream.worker.pace import Cadence, Pace
from gradstream.worker.patience import wait_until

_log = structlog.get_logger(__name__)


class Copier(Protocol):
    """What a snapshot needs of the engine."""

    def capture(self, model_ids: Collection[ModelId]) -> list[ModelState]:
        """Copies of these models as they are between two batches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What every cut says of the engine that wrote it."""

    engine: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    head: CutHead
    changed: Sequence[ModelState]
    live: Collection[ModelId]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A batch, the log entry before the oldest job that was open after it, and where on disk that job stands."""

    batch: BatchId
    cursor: str
    position: Position


class Snapshots:
    """Cuts of one epoch. The leader's thread calls everything but what the writing thread does.

    finish is called by the writing thread for each cut that is on disk, waits until the cut's batch is committed, and returns up to where
    the kept cuts cover the log. position tells where a reader of the log on disk must start to meet every open job. changed: models
    that are not as in the store's base cut; the first cut is after the first batch of this epoch. cadence None: no cuts; everything that
    was committed counts as covered.
    """

    def __init__(  # noqa: PLR0913 - what it works with, each named
        self,
        *,
        engine: Copier,
        store: SnapshotStore,
        finish: Callable[[Cut], Covered | None],
        position: Callable[[], Position],
        stamp: Stamp,
        cadence: Cadence | None,
        clock: Clock,
        changed: Collection[ModelId] = (),
        covered: Covered | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._finish = finish
        self._position = position
        self._stamp = stamp
        self._pace = None if cadence is None else Pace(cadence, clock=clock)
        self._clock = clock
        self._place: Place | None = None
        self._dirty: set[ModelId] = set(changed)
        self._changed = threading.Condition()
        self._order: _Order | None = None
        # The order's files are on disk, or could not be written; `finish` may still be at work.
        self._is_over = True
        self._error: Exception | None = None
        self._closing = False
        self._covered = covered
        self._thread = threading.Thread(target=self._run, name="snapshots", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread after what it is writing."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def covered(self) -> Covered | None:
        """Up to where the kept cuts make the log dispensable; None while there is no cut."""
        with self._changed:
            return self._covered

    def ran(self, batch: BatchId, changed: Collection[ModelId], *, cursor: str, elapsed_s: float) -> None:
        """Take in a batch before it is committed. Raises what broke the thread."""
        self._place = Place(batch=batch, cursor=cursor, position=self._position())
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._pace is None:
                self._covered = Covered(batch=batch, entry_id=cursor)
            else:
                self._pace.ran(has_changed=bool(changed), elapsed_s=elapsed_s)
                self._dirty.update(changed)

    def is_due(self) -> bool:
        """True when a cut should be taken now and can be."""
        with self._changed:
            if self._pace is None or self._place is None or self._order is not None:
                return False
            return self._pace.is_due(has_changed=bool(self._dirty))

    def take(self, live: Collection[ModelId]) -> None:
        """Copy the models that changed since the last cut, and have them written. Between batches, when none is in work."""
        assert self._place is not None, "nothing has run"
        assert self._pace is not None, "no cuts are taken here"
        with self._changed:
            assert self._order is None, "a snapshot is being written"
            dirty, self._dirty = self._dirty & set(live), set()
        start_s = self._clock.monotonic_s()
        changed = self._engine.capture(sorted(dirty))
        with self._changed:
            self._pace.copied(self._clock.monotonic_s() - start_s)
        head = CutHead(
            epoch=self._place.batch.epoch,
            number=self._place.batch.number,
            cursor=self._place.cursor,
            log_segment=self._place.position.segment,
            log_offset=self._place.position.offset,
            fingerprint=self._stamp.fingerprint,
            engine=self._stamp.engine,
            created_ms=self._clock.wall_ms(),
        )
        with self._changed:
            self._order = _Order(head=head, changed=changed, live=frozenset(live))
            self._is_over = False
            self._changed.notify_all()

    def take_now(self, live: Collection[ModelId], *, on_tick: Callable[[], None]) -> None:
        """Take a cut and return when it is on disk, or could not be written, which is logged. Calls on_tick every few seconds."""
        if self._pace is not None:
            self._wait(lambda: self._order is None, on_tick)
            self.take(live)
            self._wait(lambda: self._is_over, on_tick)

    def finish(self, live: Collection[ModelId], *, on_tick: Callable[[], None]) -> None:
        """On a clean stop: leave a cut of what changed, if anything did."""
        if self._pace is None:
            return
        self._wait(lambda: self._order is None, on_tick)
        if self._dirty and self._place is not None:
            self.take(live)
            self._wait(lambda: self._order is None, on_tick)

    def _wait(self, is_done: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        wait_until(self._changed, is_done, error=lambda: self._error, on_tick=on_tick)

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
        except Exception as error:  # noqa: BLE001 - the guard of a background task
            # The background-task guard: the leader raises it on its own thread.
            _log.exception("snapshots_failed")
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _write_next(self) -> bool:
        """Wait for an order and write it; False at the end. No frame that stays may hold an order: it has copies of whole models."""
        order = self._next()
        if order is not None:
            self._write(order)
        return order is not None

    def _next(self) -> _Order | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._order is not None)
            return self._order

    def _write(self, order: _Order) -> None:
        start_s = self._clock.monotonic_s()
        covered, is_done = None, False
        try:
            cut = self._store.write(order.head, order.changed, live=order.live)
            self._set_over()
            covered = self._finish(cut)
            is_done = True
        except (StorageFailure, Unavailable) as error:
            _log.error("snapshot_failed", reason=error.message, batch=_batch(order.head))
        else:
            _log.info(
                "snapshot",
                batch=_batch(order.head),
                num_models=len(order.live),
                num_changed=len(order.changed),
                num_bytes=sum(model.size_bytes for model in order.changed),
                elapsed_ms=round(1000 * (self._clock.monotonic_s() - start_s), 1),
            )
        with self._changed:
            self._order, self._is_over = None, True
            if not is_done:
                # All of them: a file of the cut before may be what is missing.
                self._dirty.update(order.live)
                assert self._pace is not None
                self._pace.failed()
            else:
                self._covered = covered
            self._changed.notify_all()

    def _set_over(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


def _batch(head: CutHead) -> str:
    return str(BatchId(head.epoch, head.number))
