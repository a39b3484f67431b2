"""What an append to the log on disk costs: microseconds a small frame, MB/s of payloads, and the scan of it all.

Run: python -m bench.disk_log [--sync everysec] [--directory DIR]
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gradstream.shared import codec
from gradstream.shared.clock import SystemClock
from gradstream.shared.columns import Column
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.port import FutureStatus, LogEntry
from gradstream.shared.wire import ForwardBackward, Job, Plan
from gradstream.worker.disklog.frames import LoggedBatch, LoggedOutcome
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.writer import DiskLogWriter, Opening, Sync

_NUM_SMALL = 5000
_NUM_SYNCED = 200
_NUM_LARGE = 60
_NUM_DATUMS = 64
_NUM_TOKENS = 2048
_MODEL = ModelId("s:train:0")


def _payload() -> bytes:
    """A forward_backward of 64 datums of 2048 tokens, with targets and weights: 1.5 MB."""
    generator = np.random.default_rng(0)
    tokens = [(generator.zipf(1.3, _NUM_TOKENS) % 150_000).astype("<i4") for _ in range(_NUM_DATUMS)]
    inputs = {
        "target_tokens": Column.of([np.roll(array, -1) for array in tokens], dtype="int32"),
        "weights": Column.of([np.ones(_NUM_TOKENS, dtype="<f4") for _ in tokens], dtype="float32"),
    }
    return codec.encode(
        ForwardBackward(tokens=Column.of(list(tokens), dtype="int32"), inputs=inputs, loss_fn="cross_entropy")
    )


def _entry(seq: int, payload: bytes, frame: bytes = b"") -> LogEntry:
    future_id = FutureId(f"{_MODEL}:{seq}")
    job = Job(future_id=future_id, owner=_MODEL, seq=seq, op="forward_backward", tenant=LOCAL_TENANT, payload=payload)
    return LogEntry(entry_id=f"{seq}-0", job=job, frame=frame)


def _batch(number: int, data: bytes) -> LoggedBatch:
    future_id = FutureId(f"{_MODEL}:{number}")
    outcome = LoggedOutcome(future_id=future_id, status=FutureStatus.DONE, digest=codec.digest(data), data=data)
    plan = Plan(kind="forward_backward", future_ids=[future_id], row_budget_tokens=4096)
    return LoggedBatch(epoch=1, number=number, plan=plan, outcomes=[outcome], cursor=f"{number}-0", at_ms=0)


def _per_call_us(call: Callable[[int], object], numbers: range) -> float:
    begin = time.perf_counter()
    for number in numbers:
        call(number)
    return (time.perf_counter() - begin) / len(numbers) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sync", choices=["always", "everysec", "no"], default="everysec")
    parser.add_argument("--directory", type=Path, default=None, help="where the log is made; a temporary directory")
    arguments = parser.parse_args()
    sync: Sync = arguments.sync
    payload, out = _payload(), sys.stdout.write
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        directory = Path(name)
        opening = Opening(engine="bench", epoch=1, fingerprint="", after=None)
        writer = DiskLogWriter.open(directory, opening, sync=sync, clock=SystemClock())
        num_batches = _NUM_SYNCED if sync == "always" else _NUM_SMALL
        started_us = _per_call_us(lambda n: writer.append_started(n, [FutureId(f"{_MODEL}:{n}")]), range(_NUM_SMALL))
        small_us = _per_call_us(lambda n: writer.append_jobs([_entry(n, b"x" * 100)]), range(_NUM_SMALL))
        batch_us = _per_call_us(lambda n: writer.append_batch(_batch(n, b"x" * 200)), range(num_batches))
        large_us = _per_call_us(lambda n: writer.append_jobs([_entry(10**6 + n, payload)]), range(_NUM_LARGE))
        frame = codec.compress(payload)
        packed_us = _per_call_us(
            lambda n: writer.append_jobs([_entry(2 * 10**6 + n, payload, frame)]), range(_NUM_LARGE)
        )
        end = writer.position()
        writer.close()
        begin = time.perf_counter()
        num_frames = sum(1 for _ in DiskLog(directory).scan())
        scan_s = time.perf_counter() - begin
    out(f"started mark        {started_us:8.1f} us\n")
    out(f"job of 100 bytes    {small_us:8.1f} us\n")
    out(f"batch, sync {sync:8s}{batch_us:8.1f} us\n")
    out(f"job of {len(payload) / 1e6:.1f} MB       {large_us:8.1f} us, {len(payload) / large_us:.0f} MB/s of payload\n")
    out(f"the same, as the API packed it {packed_us:8.1f} us, {large_us / packed_us:.1f}x less\n")
    out(f"scan                {num_frames} frames, {end.offset / 1e6:.1f} MB on disk, in {scan_s:.2f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
