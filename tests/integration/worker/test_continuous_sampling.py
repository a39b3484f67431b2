"""A long sample, training, and samples that come later share a gang; a gang that ends leaves its samples to the next one."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import redis.asyncio
from tests.support.gang import Client, forward_backward, gang, optim_step, settings_file

from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import ForwardBackwardDone, OptimStepDone, Outcome, Sample, SampleDone, SamplingParams

pytestmark = [pytest.mark.slow]

STARTED_S = 60


class Log:
    """What Redis knows of the jobs of one engine."""

    def __init__(self, url: str, engine: str) -> None:
        self._redis = redis.asyncio.Redis.from_url(url)
        self._keys = Keys(engine)

    async def starts(self, future: FutureId) -> int:
        return int(await self._redis.hget(self._keys.future(future), "starts") or 0)

    async def started(self, future: FutureId) -> None:
        """Return when a gang runs the job."""
        async with asyncio.timeout(STARTED_S):
            while not await self.starts(future):  # noqa: ASYNC110 - a poll with a deadline
                await asyncio.sleep(0.02)

    async def commits(self) -> list[list[str]]:
        """The futures of every commit, in order."""
        entries = await self._redis.xrange(self._keys.journal)
        return [fields[b"futures"].decode().split() for _, fields in entries]

    async def close(self) -> None:
        await self._redis.aclose()


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


@pytest.fixture
async def log(redis_url: str, engine_name: str) -> AsyncIterator[Log]:
    log = Log(redis_url, engine_name)
    yield log
    await log.close()


def sample(*, max_tokens: int, seed: int, num_samples: int = 1) -> Sample:
    prompt = np.arange(40, 50, dtype="<i4").tobytes()
    params = SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=[])
    return Sample(path=None, prompt=prompt, params=params, num_samples=num_samples)


# Seconds of work, so that tests meet it running; few enough samples that others find room beside them.
LONG = sample(max_tokens=800, seed=1, num_samples=48)
SHORT = sample(max_tokens=5, seed=2)


def tokens(outcome: Outcome) -> list[bytes]:
    assert isinstance(outcome, SampleDone), outcome
    return [one.tokens for one in outcome.sequences]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.gloo)])
async def test_training_and_a_late_short_sample_end_before_a_long_one_and_its_tokens_are_those_it_has_alone(
    tmp_path: Path, redis_url: str, engine_name: str, client: Client, log: Log, num_ranks: int
) -> None:
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, num_ranks=num_ranks)
    long = await client.sample_as(LONG, 1)
    model, _ = await client.create()
    training = []
    for step in range(8):
        training.append(await client.submit(model, forward_backward(30, 20, seed=step)))
        training.append(await client.submit(model, optim_step()))
    with gang(settings, num_ranks=num_ranks):
        assert isinstance(await client.outcome(training[0]), ForwardBackwardDone)
        short = await client.sample_as(SHORT, 2)
        outcomes = await client.outcomes([*training, short, long])
        assert isinstance(outcomes[-3], OptimStepDone)
        alone = await client.outcomes([await client.sample_as(LONG, 3), await client.sample_as(SHORT, 4)])
    assert tokens(outcomes[-1]) == tokens(alone[0])
    assert tokens(outcomes[-2]) == tokens(alone[1])
    commits = await log.commits()
    order = [future for commit in commits for future in commit]
    assert order.index(training[-1]) < order.index(long)
    assert order.index(short) < order.index(long)
    assert len(order) == len(set(order))
    assert all(commits), "a slice in which nothing ended is not journaled"


async def test_samples_that_a_killed_gang_was_running_get_the_same_tokens_from_the_next_one(
    tmp_path: Path, redis_url: str, engine_name: str, client: Client, log: Log
) -> None:
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name)
    other = sample(max_tokens=700, seed=5, num_samples=48)
    futures = [await client.sample_as(LONG, 1), await client.sample_as(other, 2)]
    with gang(settings) as first:
        for future in futures:
            await log.started(future)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    for future in futures:
        view = await client.intake.future(future)
        assert view is not None
        assert view.outcome is None
    with gang(settings):
        again = await client.outcomes(futures)
        fresh = await client.outcomes([await client.sample_as(LONG, 3), await client.sample_as(other, 4)])
    assert [tokens(one) for one in again] == [tokens(one) for one in fresh]
    assert [await log.starts(future) for future in futures] == [2, 2]


async def test_any_number_of_clean_stops_convicts_no_sample(
    tmp_path: Path, redis_url: str, engine_name: str, client: Client, log: Log
) -> None:
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name)
    future = await client.sample_as(LONG, 1)
    for _ in range(2):
        with gang(settings) as process:
            await log.started(future)
            process.terminate()
            assert process.wait(timeout=60) == 0
        assert await log.starts(future) == 0
        assert not await client.intake.is_worker_alive()
    with gang(settings):
        assert isinstance(await client.outcome(future), SampleDone)
