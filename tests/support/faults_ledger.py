"""What the queue's server knows of jobs, futures and batches, read past all of gradstream's own code, and the rules it must obey."""

import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from gradstream.shared.ids import UNLOAD_SEQ, future_parts, lane_of
from gradstream.shared.joblog.keys import Keys

_TERMINAL = ("done", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedJob:
    """One entry of the stream of accepted jobs."""

    entry_id: str
    future_id: str
    op: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledBatch:
    """One entry of the journal."""

    batch: str
    future_ids: Sequence[str]
    statuses: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Everything at one moment. futures: status by id."""

    jobs: Sequence[LoggedJob]
    batches: Sequence[JournaledBatch]
    futures: dict[str, str]
    outcomes: dict[str, bytes]
    stream_lengths: dict[str, int]
    memory_bytes: int


def read_ledger(client: "redis.Redis", keys: Keys) -> Ledger:
    """The ledger as it is now."""
    reader: Any = client  # redis-py's replies have no useful types
    jobs = [
        LoggedJob(entry_id=entry.decode(), future_id=fields[b"future"].decode(), op=fields[b"op"].decode())
        for entry, fields in reader.xrange(keys.log)
    ]
    batches = [
        JournaledBatch(
            batch=entry.decode(),
            future_ids=fields[b"futures"].decode().split(),
            statuses=fields[b"statuses"].decode().split(),
        )
        for entry, fields in reader.xrange(keys.journal)
    ]
    futures, outcomes = {}, {}
    for key in reader.scan_iter(match=f"{keys.prefix.replace('{', '[{]').replace('}', '[}]')}future:*", count=1000):
        future_id = key.decode().removeprefix(f"{keys.prefix}future:")
        status, outcome = reader.hmget(key, "status", "outcome")
        futures[future_id] = (status or b"none").decode()
        outcomes[future_id] = outcome or b""
    return Ledger(
        jobs=jobs,
        batches=batches,
        futures=futures,
        outcomes=outcomes,
        stream_lengths={name: reader.xlen(f"{keys.prefix}{name}") for name in ("log", "journal", "notes")},
        memory_bytes=int(reader.info("memory")["used_memory"]),
    )


def settled_ledger(client: "redis.Redis", keys: Keys, *, timeout_s: float = 240.0) -> Ledger:
    """The ledger once no future is open; after timeout_s as it is then."""
    deadline = time.monotonic() + timeout_s
    while True:
        ledger = read_ledger(client, keys)
        if not open_futures(ledger) or time.monotonic() > deadline:
            return ledger
        time.sleep(0.2)


def open_futures(ledger: Ledger) -> list[str]:
    return sorted(name for name, status in ledger.futures.items() if status not in _TERMINAL)


def violations(ledger: Ledger) -> list[str]:
    """One line for each rule that is broken.

    Every accepted future has one outcome; each executed job stands in one batch, once; a model's jobs ran in the order of their
    seqs; ids of batches grow. The journal and the log may be trimmed at their old ends, together.
    """
    lines = [f"future {name} is still {ledger.futures[name]}" for name in open_futures(ledger)]
    lines += [
        f"future {name} has no outcome"
        for name, status in ledger.futures.items()
        if status == "done" and not ledger.outcomes[name]
    ]
    counts = Counter(name for batch in ledger.batches for name in batch.future_ids)
    lines += [f"future {name} stands in the journal {count} times" for name, count in counts.items() if count > 1]
    lines += _unjournaled(ledger, counts)
    lines += _disorder(ledger)
    ids = [_batch_id(batch.batch) for batch in ledger.batches]
    lines += [f"batch {later} follows {earlier}" for earlier, later in itertools.pairwise(ids) if later <= earlier]
    logged = Counter(job.future_id for job in ledger.jobs)
    lines += [f"future {name} was accepted {count} times" for name, count in logged.items() if count > 1]
    return lines


def _unjournaled(ledger: Ledger, counts: Counter[str]) -> list[str]:
    """Accepted jobs that no batch holds, left out those from before the oldest batch that is kept."""
    first = next((job for job in ledger.jobs if counts[job.future_id]), None)
    if first is None:
        return []
    start = ledger.jobs.index(first)
    return [
        f"future {job.future_id} ({job.op}) is in no batch" for job in ledger.jobs[start:] if not counts[job.future_id]
    ]


def _disorder(ledger: Ledger) -> list[str]:
    """Jobs of one model and lane that ran after one with a higher seq. Samplers' jobs have no order."""
    lines = []
    last: dict[tuple[str, int], int] = {}
    for batch in ledger.batches:
        for future_id in batch.future_ids:
            job = future_parts(future_id)
            owner, seq = job.owner, job.seq
            if ":train:" not in owner or seq >= UNLOAD_SEQ:
                continue
            place = (owner, lane_of(seq))
            if seq <= last.get(place, -1):
                lines.append(f"batch {batch.batch}: {future_id} ran after seq {last[place]} of its model")
            last[place] = max(seq, last.get(place, -1))
    return lines


def _batch_id(text: str) -> tuple[int, int]:
    epoch, _, number = text.partition("-")
    return int(epoch), int(number)
