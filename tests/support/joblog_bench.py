"""An intake and a feed on one engine, with short words for what tests do with them."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

import redis

from gradstream.shared import codec
from gradstream.shared.ids import LOCAL_TENANT, ModelId, TenantId
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import (
    BatchId,
    Commit,
    Covered,
    Ended,
    FutureView,
    LogEntry,
    Receipt,
    RecordKind,
    RecordWrite,
    Submission,
)
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Failed, OptimStepDone, Outcome

MODEL = ModelId("s1:train:0")


@dataclass
class Bench:
    intake: RedisIntake
    feed: RedisFeed
    raw: "redis.Redis"
    keys: Keys
    url: str
    epoch: int = 0
    number: int = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, url: str, engine: str, limits: Limits) -> AsyncIterator["Bench"]:
        raw = redis.Redis.from_url(url, protocol=2, decode_responses=True, encoding_errors="replace")
        async with RedisIntake(url, engine=engine, limits=limits) as intake:
            with RedisFeed(url, engine=engine, limits=limits) as feed:
                bench = cls(intake=intake, feed=feed, raw=raw, keys=Keys(engine), url=url)
                bench.epoch = feed.acquire(owner="test-gang")
                yield bench
        raw.close()

    async def create(self, model: ModelId = MODEL, *, tenant: TenantId = LOCAL_TENANT) -> Receipt:
        """Submit seq 0 of a model."""
        return await self.submit(0, b"create", model=model, tenant=tenant, record={"base_model": "tiny"})

    async def submit(
        self,
        seq: int,
        payload: bytes = b"payload",
        *,
        model: ModelId = MODEL,
        tenant: TenantId = LOCAL_TENANT,
        record: Mapping[str, str] | None = None,
    ) -> Receipt:
        return await self.intake.submit(
            Submission(owner=model, seq=seq, op="optim_step", tenant=tenant, payload=payload, model_record=record)
        )

    def log(self) -> list[LogEntry]:
        """Every entry that is in the log."""
        return self.feed.read("0-0", count=10_000, block_ms=0)

    def seqs(self, model: ModelId = MODEL) -> list[int]:
        """Seqs of the model's entries in log order."""
        return [entry.job.seq for entry in self.log() if entry.job.owner == model]

    def commit(
        self,
        entries: list[LogEntry],
        outcome: Outcome | None = None,
        *,
        records: list[RecordWrite] | None = None,
        number: int | None = None,
        epoch: int | None = None,
        cursor: str | None = None,
    ) -> Commit:
        """Commit one outcome for the entries; the cursor moves to the last of them."""
        if number is None:
            self.number += 1
        result = outcome or OptimStepDone(metrics={"loss": 0.5})
        batch = BatchId(self.epoch if epoch is None else epoch, self.number if number is None else number)
        cursor = cursor or (entries[-1].entry_id if entries else self.feed.cursor())
        commit = Commit(
            epoch=batch.epoch,
            number=batch.number,
            covered=Covered(batch=batch, entry_id=cursor),
            outcomes=[Ended.of(entry.job, result) for entry in entries],
            plan=b"plan",
            cursor=cursor,
            records=records or [],
        )
        self.feed.commit(commit)
        return commit

    async def ready(self, model: ModelId = MODEL) -> None:
        """Create the model and commit its creation."""
        await self.create(model)
        entries = [entry for entry in self.log() if entry.is_open and entry.job.owner == model]
        self.commit(entries, records=[ready(model)])

    async def view(self, seq: int, model: ModelId = MODEL) -> FutureView:
        view = await self.intake.future(f"{model}:{seq}")
        assert view is not None
        return view

    async def failure(self, seq: int, model: ModelId = MODEL) -> Failed:
        """The failed outcome of a seq."""
        view = await self.view(seq, model)
        assert view.outcome is not None
        outcome = codec.decode_outcome(view.outcome)
        assert isinstance(outcome, Failed)
        return outcome

    async def record(self, model: ModelId = MODEL) -> dict[str, str]:
        record = await self.intake.record(RecordKind.MODEL, model)
        assert record is not None
        return record

    def num_keys(self) -> int:
        return sum(1 for _ in self.raw.scan_iter(match=self.keys.prefix.replace("{", "\\{") + "*", count=1000))


def ready(model: ModelId = MODEL) -> RecordWrite:
    """The record change that a commit of create_model carries."""
    return RecordWrite(kind=RecordKind.MODEL, record_id=model, fields={"state": "ready"})
