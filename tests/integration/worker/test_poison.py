"""A job that kills every gang that runs it is set aside, and its neighbours are served."""

import asyncio
import multiprocessing
import os
import time
from collections.abc import Collection
from pathlib import Path
from unittest.mock import patch

import msgspec
from tests.support.cards import UNIFORM_CARD
from tests.support.gang import Client

from gradstream.engine.checkpoint.drafts import Drafts
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared import codec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.clock import SystemClock
from gradstream.shared.ids import FutureId, ModelId, TenantId
from gradstream.shared.joblog.port import Commit
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Batch, Failed, Outcome, SampleDone
from gradstream.worker.control import Control
from gradstream.worker.dead import DeadLetters
from gradstream.worker.fence import StopRequest
from gradstream.worker.gang import LeadOptions, lead
from gradstream.worker.journal import Journal
from gradstream.worker.keeping import Durability
from gradstream.worker.plan import Limits

POISON = "tinker://poison"
LOG_BATCH = Journal.batch


class Broken(Exception):
    """What ends a process."""


class Engine:
    """Serves samples, breaks on the poisoned one, and asks for a stop when `last` samples were served."""

    def __init__(self, stop: StopRequest, *, last: int) -> None:
        self._stop = stop
        self._left = last

    def card(self, *, epoch: int) -> EngineCard:
        return msgspec.structs.replace(UNIFORM_CARD, epoch=epoch)

    def models(self) -> dict[ModelId, TenantId]:
        return {}

    def capture(self, model_ids: Collection[ModelId]) -> list[ModelState]:
        assert not model_ids
        return []

    def prepare_saves_in(self, drafts: Drafts) -> None:
        """It saves nothing."""

    def execute(self, batch: Batch) -> dict[FutureId, Outcome]:
        for job in batch.jobs:
            if codec.decode_payload(job.payload).path == POISON:
                raise Broken
        self._left -= len(batch.jobs)
        self._stop.asked = self._left <= 0
        return {job.future_id: SampleDone(sequences=[]) for job in batch.jobs}


def log_slowly(journal: Journal, commit: Commit) -> None:
    """Take longer to log an outcome than the gang takes to run the next batch."""
    time.sleep(0.3)
    LOG_BATCH(journal, commit)


def run_gang(redis_url: str, engine: str, directory: Path, *, last: int) -> int | None:
    """One gang in a process of its own, until it breaks or has served `last` samples: its exit status."""
    process = multiprocessing.get_context("spawn").Process(target=_lead, args=(redis_url, engine, directory, last))
    process.start()
    process.join(timeout=240)
    return process.exitcode


def _lead(redis_url: str, engine: str, directory: Path, last: int) -> None:
    stop = StopRequest()
    options = LeadOptions(
        owner="launcher",
        output_dir=directory,
        limits=Limits(batch_tokens=1000, batch_jobs=8, row_budget_tokens=100),
        read_ahead_bytes=1 << 20,
        durability=Durability(engine="main", joblog=directory / "joblog", snapshots=directory / "snapshots"),
    )
    with patch.object(Journal, "batch", log_slowly), RedisFeed(redis_url, engine=engine) as feed:
        control = Control(rank=0, num_ranks=1, group=None)
        try:
            lead(Engine(stop, last=last), control, feed, options=options, clock=SystemClock(), stop=stop)
        except Broken:
            # As a rank does: no thread is waited for.
            os._exit(1)


async def submit_all(redis_url: str, engine: str) -> list[str]:
    async with RedisIntake(redis_url, engine=engine) as intake:
        client = Client(intake)
        paths = [None, POISON, None]
        return [await client.sample(path, seq) for seq, path in enumerate(paths, start=1)]


async def outcomes(redis_url: str, engine: str, futures: list[str]) -> list[Outcome]:
    async with RedisIntake(redis_url, engine=engine) as intake:
        return await Client(intake).outcomes(futures)


def test_after_two_deaths_the_poisoned_job_fails_and_the_others_are_served(redis_url, engine_name, tmp_path):
    futures = asyncio.run(submit_all(redis_url, engine_name))
    # All three share the first batch; then each runs alone, and the next one only when its outcome is recorded, so the second death
    # convicts the right one.
    for _ in range(2):
        assert run_gang(redis_url, engine_name, tmp_path, last=3) == 1
    assert run_gang(redis_url, engine_name, tmp_path, last=1) == 0
    first, poisoned, third = asyncio.run(outcomes(redis_url, engine_name, futures))
    assert isinstance(first, SampleDone)
    assert isinstance(third, SampleDone)
    assert isinstance(poisoned, Failed)
    assert (poisoned.code, poisoned.category) == ("server_error", "server")
    assert "set aside" in poisoned.message
    (letter,) = DeadLetters(tmp_path).survey().letters
    assert (letter.future_id, letter.starts, letter.error) == (futures[1], 2, poisoned)
    assert codec.decode_payload(DeadLetters(tmp_path).payload(letter)).path == POISON
