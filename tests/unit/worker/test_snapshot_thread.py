"""What the thread that writes snapshots leaves in memory, and how often it is given something to write."""

import time
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tests.support.snapshots import model_state

from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import ManualClock
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import BatchId, Covered
from gradstream.worker.disklog.frames import Position
from gradstream.worker.pace import Cadence
from gradstream.worker.snapshots import Snapshots, Stamp

MODEL = ModelId("m")
COVERED = Covered(batch=BatchId(1, 1), entry_id="1-0")


class Copies:
    """Copies of a model that take copy_s each, known here only as long as somebody else holds them."""

    def __init__(self, clock: ManualClock, copy_s: float = 0.0) -> None:
        self.made: list[weakref.ref[torch.Tensor]] = []
        self._clock = clock
        self._copy_s = copy_s

    def capture(self, model_ids: Collection[ModelId]) -> list[ModelState]:
        states = [model_state(name) for name in model_ids]
        self._clock.advance(self._copy_s)
        self.made += [weakref.ref(tensor) for state in states for tensor in state.tensors.values()]
        return states

    def num_alive(self) -> int:
        return sum(one() is not None for one in self.made)


@contextmanager
def snapshots(directory: Path, engine: Copies, clock: ManualClock) -> Iterator[Snapshots]:
    running = Snapshots(
        engine=engine,
        store=SnapshotStore(directory),
        finish=lambda _cut: COVERED,
        position=lambda: Position("00000001-000000.seg", 0),
        stamp=Stamp(engine="main", fingerprint="f"),
        cadence=Cadence(budget_s=60.0),
        clock=clock,
    )
    running.start()
    try:
        yield running
    finally:
        running.close()


def train(running: Snapshots, number: int, *, elapsed_s: float) -> None:
    running.ran(BatchId(1, number), [MODEL], cursor=f"{number}-0", elapsed_s=elapsed_s)


def test_a_copy_is_gone_once_it_is_written(tmp_path: Path) -> None:
    clock = ManualClock()
    engine = Copies(clock)
    with snapshots(tmp_path, engine, clock) as running:
        train(running, 1, elapsed_s=1.0)
        running.take([MODEL])
        assert engine.made
        deadline = time.monotonic() + 120
        while engine.num_alive() or running.covered is None:
            assert time.monotonic() < deadline, "the thread still holds the copy"
            time.sleep(0.005)


def test_training_stands_still_for_copies_a_tenth_of_the_time_at_most(tmp_path: Path) -> None:
    clock = ManualClock()
    with snapshots(tmp_path, Copies(clock, copy_s=20.0), clock) as running:
        train(running, 1, elapsed_s=60.0)
        assert running.is_due()
        running.take_now([MODEL], on_tick=lambda: None)
        running.finish([MODEL], on_tick=lambda: None)
        train(running, 2, elapsed_s=199.0)
        assert not running.is_due()
        train(running, 3, elapsed_s=1.0)
        assert running.is_due()
