"""A job that kills every gang that runs it is set aside, and its neighbours are served."""

import asyncio
from pathlib import Path

import pytest
from tests.support.gang import Client

from gradstream.shared import codec
from gradstream.shared.clock import SystemClock
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Batch, Failed, Outcome, SampleDone
from gradstream.worker.backlog import Backlog
from gradstream.worker.commit import Committer
from gradstream.worker.control import Control
from gradstream.worker.fence import StopRequest
from gradstream.worker.leader import Crew, Leader
from gradstream.worker.models import Models
from gradstream.worker.plan import Limits
from gradstream.worker.reader import LogReader
from gradstream.worker.storage import Storage
from gradstream.worker.watchdog import Watchdog

POISON = "tinker://poison"


class Broken(Exception):
    """What ends a process."""


class Engine:
    """Serves samples, breaks on the poisoned one, and asks for a stop when `last` samples were served."""

    def __init__(self, stop: StopRequest, *, last: int) -> None:
        self._stop = stop
        self._left = last

    def execute(self, batch: Batch) -> dict[FutureId, Outcome]:
        for job in batch.jobs:
            if codec.decode_payload(job.payload).path == POISON:
                raise Broken
        self._left -= len(batch.jobs)
        self._stop.asked = self._left <= 0
        return {job.future_id: SampleDone(sequences=[]) for job in batch.jobs}


def run_gang(feed: RedisFeed, directory: Path, *, last: int) -> None:
    """One gang in this process, until it breaks or has served `last` samples."""
    stop = StopRequest()
    epoch = feed.acquire(owner="launcher")
    cursor = feed.cursor()
    crew = Crew(
        engine=Engine(stop, last=last),
        control=Control(rank=0, num_ranks=1, group=None),
        feed=feed,
        reader=LogReader(feed, cursor=cursor, max_bytes=1 << 20),
        committer=Committer(feed),
        backlog=Backlog(cursor=cursor),
        models=Models(lost=[], last_checkpoint=lambda _: None),
        storage=Storage(directory),
        watchdog=Watchdog(timeout_s=60, clock=SystemClock()),
        clock=SystemClock(),
    )
    crew.reader.start()
    crew.committer.start()
    limits = Limits(batch_tokens=1000, batch_jobs=8, row_budget_tokens=100)
    try:
        Leader(crew, epoch=epoch, limits=limits, stop=stop).run()
    finally:
        crew.reader.close()
        crew.committer.close()


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
    with RedisFeed(redis_url, engine=engine_name) as feed:
        # All three share the first batch; then each runs alone, so the second death convicts the right one.
        for _ in range(2):
            with pytest.raises(Broken):
                run_gang(feed, tmp_path, last=3)
        run_gang(feed, tmp_path, last=1)
    first, poisoned, third = asyncio.run(outcomes(redis_url, engine_name, futures))
    assert isinstance(first, SampleDone)
    assert isinstance(third, SampleDone)
    assert isinstance(poisoned, Failed)
    assert (poisoned.code, poisoned.category) == ("server_error", "server")
    assert "set aside" in poisoned.message
