"""Ended sessions and old checkpoints on a real Redis, swept by rq tasks."""

import asyncio
from pathlib import Path

import pytest
import redis
from rq import SimpleWorker
from rq.serializers import JSONSerializer
from tests.support.gang import Client, optim_step, output_dir, settings_file

from gradstream.engine.checkpoint.location import ephemeral
from gradstream.shared import ids
from gradstream.shared.clock import SystemClock
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker.housekeeping import TASKS, enqueue, queue_for
from gradstream.worker.sweeps import UNLOAD_SEQ


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, engine_name: str) -> Path:
    return settings_file(tmp_path, redis_url=redis_url, engine=engine_name)


def sweep(redis_url: str, engine: str, settings: Path) -> None:
    """Run every task once through rq; a task that failed fails the test."""
    connection = redis.Redis.from_url(redis_url)
    queue = queue_for(engine, connection)
    for task in TASKS:
        assert enqueue(queue, task, settings_file=settings)
        assert not enqueue(queue, task, settings_file=settings)
    SimpleWorker([queue], connection=connection, serializer=JSONSerializer).work(burst=True)
    assert queue.failed_job_registry.get_job_ids() == []
    connection.close()


def test_a_finished_sessions_models_are_unloaded_behind_their_queued_jobs_and_its_samplers_removed(
    redis_url, engine_name, settings
):
    async def prepare() -> Path:
        async with RedisIntake(redis_url, engine=engine_name) as intake:
            client = Client(intake)
            now = str(SystemClock().wall_ms())
            await intake.put_record(
                RecordKind.SESSION, "s1", {"tenant": "local", "heartbeat_ms": now, "finished_ms": now}
            )
            await intake.put_record(RecordKind.SESSION, "s2", {"tenant": "local", "heartbeat_ms": now})
            model, _ = await client.create()
            await client.submit(model, optim_step())
            await Client(intake, session="s2").create()
            sampler = ids.sampler_id(client.session, 1)
            await intake.put_record(RecordKind.SAMPLER, sampler, {"tenant": "local", "session": "s1"})
            directory = ephemeral(sampler).directory(output_dir(settings))
            directory.mkdir(parents=True)
            return directory

    directory = asyncio.run(prepare())
    sweep(redis_url, engine_name, settings)
    sweep(redis_url, engine_name, settings)
    with RedisFeed(redis_url, engine=engine_name) as feed:
        jobs = [(entry.job.owner, entry.job.op, entry.job.seq) for entry in feed.read("0-0", count=10, block_ms=0)]
        assert jobs == [
            ("s1:train:1", "create_model", 0),
            ("s1:train:1", "optim_step", 1),
            ("s2:train:1", "create_model", 0),
            ("s1:train:1", "unload_model", UNLOAD_SEQ),
        ]
        assert feed.record(RecordKind.SAMPLER, "s1:sample:1") is None
        assert "swept_ms" in feed.record(RecordKind.SESSION, "s1")
        assert "swept_ms" not in feed.record(RecordKind.SESSION, "s2")
    assert not directory.exists()


def test_a_checkpoint_past_its_time_is_removed_and_others_stay(redis_url, engine_name, settings):
    now_ms = SystemClock().wall_ms()
    expiry = {"old": str(now_ms - 1000), "young": str(now_ms + 3_600_000), "forever": ""}
    uris = {name: f"tinker://m/weights/{name}" for name in expiry}

    async def prepare() -> None:
        async with RedisIntake(redis_url, engine=engine_name) as intake:
            for name, expires_ms in expiry.items():
                await intake.put_record(RecordKind.CHECKPOINT, uris[name], {"expires_ms": expires_ms})

    asyncio.run(prepare())
    folders = {name: output_dir(settings) / "checkpoints" / "m" / "weights" / name for name in expiry}
    for folder in folders.values():
        folder.mkdir(parents=True)
    sweep(redis_url, engine_name, settings)
    with RedisFeed(redis_url, engine=engine_name) as feed:
        left = [name for name in expiry if feed.record(RecordKind.CHECKPOINT, uris[name])]
    assert left == ["young", "forever"]
    assert [name for name, folder in folders.items() if folder.exists()] == left
