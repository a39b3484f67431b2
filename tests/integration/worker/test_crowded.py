"""Of jobs that have no room together those that have it alone are done, and a successor repeats exactly that."""

import asyncio
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

from tests.support.engine_builders import open_engine
from tests.support.gang import Client, forward_backward, optim_step

from gradstream.engine.engine import Engine
from gradstream.engine.ops import forward_backward as passes
from gradstream.engine.passes import AdapterWork, run_adapters
from gradstream.engine.rows import JobTensors
from gradstream.shared.clock import SystemClock
from gradstream.shared.errors import OutOfMemory
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Batch, Failed, ForwardBackwardDone, OptimStepDone, Outcome
from gradstream.worker.control import Control
from gradstream.worker.fence import StopRequest
from gradstream.worker.gang import LeadOptions, lead
from gradstream.worker.keeping import Durability
from gradstream.worker.plan import Limits

ROOM_TOKENS = 30


def crowded(base: object, comm: object, work: Sequence[AdapterWork], *rest: object, **more: object) -> list[JobTensors]:
    """Passes on a device that has room for so many tokens."""
    if sum(one.datums.num_tokens for one in work) > ROOM_TOKENS:
        raise OutOfMemory("forward_backward: no room")
    return run_adapters(base, comm, work, *rest, **more)  # type: ignore[arg-type]


class Small:
    """An engine on such a device. At an update it dies, or asks for a stop."""

    def __init__(self, engine: Engine, stop: StopRequest, *, dies: bool) -> None:
        self._engine = engine
        self._stop = stop
        self._dies = dies
        self.card = engine.card
        self.models = engine.models
        self.capture = engine.capture
        self.prepare_saves_in = engine.prepare_saves_in

    def execute(self, batch: Batch) -> dict[FutureId, Outcome]:
        if batch.plan.kind == "optim_step":
            if self._dies:
                os._exit(1)
            self._stop.asked = True
        return self._engine.execute(batch)


def run_gang(redis_url: str, engine: str, directory: Path, *, dies: bool) -> int | None:
    process = multiprocessing.get_context("spawn").Process(target=_lead, args=(redis_url, engine, directory, dies))
    process.start()
    try:
        process.join(timeout=240)
        return process.exitcode
    finally:
        process.kill()
        process.join()


def _lead(redis_url: str, engine: str, directory: Path, dies: bool) -> None:
    stop = StopRequest()
    options = LeadOptions(
        owner="launcher",
        output_dir=directory,
        limits=Limits(batch_tokens=1000, batch_jobs=8, row_budget_tokens=100),
        read_ahead_bytes=1 << 20,
        durability=Durability(engine="main", joblog=directory / "joblog", snapshots=directory / "snapshots"),
    )
    passes.run_adapters = crowded  # type: ignore[assignment]
    small = Small(open_engine(output_dir=directory), stop, dies=dies)
    with RedisFeed(redis_url, engine=engine) as feed:
        lead(small, Control(rank=0, num_ranks=1, group=None), feed, options=options, clock=SystemClock(), stop=stop)


async def submit_all(redis_url: str, engine: str) -> list[FutureId]:
    async with RedisIntake(redis_url, engine=engine) as intake:
        client = Client(intake)
        (one, _), (other, _) = await client.create(1), await client.create(2)
        return [
            await client.submit(one, forward_backward(7, 9, seed=1)),
            await client.submit(one, forward_backward(12, 8, seed=2)),
            await client.submit(other, forward_backward(40, seed=3)),
            await client.submit(one, optim_step()),
        ]


async def outcomes(redis_url: str, engine: str, futures: list[FutureId]) -> list[Outcome]:
    async with RedisIntake(redis_url, engine=engine) as intake:
        return await Client(intake).outcomes(futures)


def test_a_job_without_room_fails_alone_and_the_others_of_its_batch_are_done(
    redis_url: str, engine_name: str, tmp_path: Path
) -> None:
    futures = asyncio.run(submit_all(redis_url, engine_name))
    assert run_gang(redis_url, engine_name, tmp_path, dies=True) == 1
    assert run_gang(redis_url, engine_name, tmp_path, dies=False) == 0
    first, second, large, step = asyncio.run(outcomes(redis_url, engine_name, futures))
    assert isinstance(first, ForwardBackwardDone)
    assert isinstance(second, ForwardBackwardDone)
    assert isinstance(large, Failed)
    assert large.code == "out_of_memory"
    # The successor came to the same bits by the recorded plans, or the model would be lost.
    assert isinstance(step, OptimStepDone)
