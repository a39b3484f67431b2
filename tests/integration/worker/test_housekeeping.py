"""Ended sessions, old files and old records on a real Redis, swept by rq tasks."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import redis
from tests.support.gang import Client, optim_step, output_dir, settings_file
from tests.support.rq_worker import work_off
from tests.support.saved import write_save

from gradstream.engine.checkpoint.location import ephemeral
from gradstream.shared import ids
from gradstream.shared.clock import ManualClock, SystemClock
from gradstream.shared.ids import UNLOAD_SEQ
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker.accounting import TOTAL
from gradstream.worker.collect import KEEP_SNAPSHOTS, UNUSED_S
from gradstream.worker.housekeeping import TASKS, Ticker, enqueue, queue_for
from gradstream.worker.records import checkpoint_fields
from gradstream.worker.retention import RETENTION_S
from gradstream.worker.rq_queue import put_once

NOW_MS = 0


@pytest.fixture(autouse=True)
def _the_test_starts_now(request, monkeypatch):
    """NOW_MS is when the test began: by the files' times, too, which the tasks compare with it."""
    monkeypatch.setattr(request.module, "NOW_MS", SystemClock().wall_ms())


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, engine_name: str) -> Path:
    return settings_file(tmp_path, redis_url=redis_url, engine=engine_name, storage_limit="1GB")


class House:
    """One engine's records and files, and the tasks that look after them."""

    def __init__(self, url: str, engine: str, settings: Path) -> None:
        self.url, self.engine, self.settings = url, engine, settings
        self.output_dir = output_dir(settings)

    def with_intake(self, work: Callable[[RedisIntake], Awaitable[None]]) -> None:
        async def run() -> None:
            async with RedisIntake(self.url, engine=self.engine) as intake:
                await work(intake)

        asyncio.run(run())

    def put(self, kind: RecordKind, record_id: str, /, **fields: str) -> None:
        self.with_intake(lambda intake: intake.put_record(kind, record_id, fields))

    def record(self, kind: RecordKind, record_id: str) -> Mapping[str, str] | None:
        with RedisFeed(self.url, engine=self.engine) as feed:
            return feed.record(kind, record_id)

    def save(self, uri: str, *, created_ms: int | None = None, recorded: bool = True, **fields: object) -> None:
        """A checkpoint on disk, with its record."""
        manifest = write_save(self.output_dir, uri, created_ms=NOW_MS if created_ms is None else created_ms, **fields)
        if recorded:
            self.put(RecordKind.CHECKPOINT, uri, **checkpoint_fields(manifest))

    def snapshot(self, number: int, *, unused_s: float = 0.0, recorded: bool = True, session: str = "s") -> Path:
        """An ephemeral snapshot that was used last unused_s ago."""
        sampler = ids.sampler_id(ids.SessionId(session), number)
        place = ephemeral(sampler)
        write_save(self.output_dir, place.uri(), created_ms=NOW_MS, num_bytes=10)
        if recorded:
            self.put(
                RecordKind.SAMPLER,
                sampler,
                tenant="local",
                session=session,
                model_path=place.uri(),
                created_ms=str(NOW_MS),
            )
        directory = place.directory(self.output_dir)
        used_s = NOW_MS / 1000 - unused_s
        os.utime(directory, (used_s, used_s))
        return directory

    def sweep(self) -> None:
        """Run every task once through rq; a task that failed fails the test."""
        connection = redis.Redis.from_url(self.url)
        queue = queue_for(self.engine, connection)
        for task in TASKS:
            assert enqueue(queue, task, settings_file=self.settings, tick_ms=NOW_MS, awake_ms=0)
            assert not enqueue(queue, task, settings_file=self.settings, tick_ms=NOW_MS, awake_ms=0)
        work_off(queue)
        assert queue.failed_job_registry.get_job_ids() == []
        connection.close()


@pytest.fixture
def house(redis_url: str, engine_name: str, settings: Path) -> House:
    return House(redis_url, engine_name, settings)


def test_a_finished_sessions_models_are_unloaded_behind_their_queued_jobs_and_its_samplers_removed(house):
    now = str(NOW_MS)

    async def prepare(intake: RedisIntake) -> None:
        client = Client(intake)
        await intake.put_record(RecordKind.SESSION, "s1", {"tenant": "local", "heartbeat_ms": now, "finished_ms": now})
        await intake.put_record(RecordKind.SESSION, "s2", {"tenant": "local", "heartbeat_ms": now})
        model, _ = await client.create()
        await client.submit(model, optim_step())
        await Client(intake, session="s2").create()

    house.with_intake(prepare)
    directory = house.snapshot(1, session="s1")
    house.sweep()
    house.sweep()
    with RedisFeed(house.url, engine=house.engine) as feed:
        jobs = [(entry.job.owner, entry.job.op, entry.job.seq) for entry in feed.read("0-0", count=10, block_ms=0)]
    assert jobs == [
        ("s1:train:1", "create_model", 0),
        ("s1:train:1", "optim_step", 1),
        ("s2:train:1", "create_model", 0),
        ("s1:train:1", "unload_model", UNLOAD_SEQ),
    ]
    assert house.record(RecordKind.SAMPLER, "s1:sample:1") is None
    assert "swept_ms" in (house.record(RecordKind.SESSION, "s1") or {})
    assert "swept_ms" not in (house.record(RecordKind.SESSION, "s2") or {})
    assert not directory.exists()


def test_a_checkpoint_past_its_time_is_removed_and_others_stay(house):
    expiry = {"old": str(NOW_MS - 1000), "young": str(NOW_MS + 3_600_000), "forever": ""}
    uris = {name: f"tinker://m/weights/{name}" for name in expiry}
    for name, expires_ms in expiry.items():
        house.save(uris[name])
        house.put(RecordKind.CHECKPOINT, uris[name], expires_ms=expires_ms)
    house.sweep()
    assert [name for name in expiry if house.record(RecordKind.CHECKPOINT, uris[name])] == ["young", "forever"]
    folders = {name: house.output_dir / "checkpoints" / "m" / "weights" / name for name in expiry}
    assert [name for name, folder in folders.items() if folder.exists()] == ["young", "forever"]


def test_a_save_that_replaced_an_expired_one_a_moment_ago_stays(house):
    uri = "tinker://m/weights/a"
    house.save(uri, created_ms=NOW_MS)
    house.put(RecordKind.CHECKPOINT, uri, created_ms=str(NOW_MS - 5000), expires_ms=str(NOW_MS - 1000))
    house.sweep()
    assert (house.output_dir / "checkpoints" / "m" / "weights" / "a").exists()
    assert house.record(RecordKind.CHECKPOINT, uri) is not None


def test_checkpoints_are_recorded_anew_when_redis_lost_them_with_the_time_to_live_that_was_set_last(house):
    kept, expired = "tinker://s:train:0/weights/kept", "tinker://s:train:0/weights/expired"
    house.save(kept, user_metadata={"renderer_name": "r"})
    house.put(RecordKind.CHECKPOINT, kept, expires_ms=str(NOW_MS + 7_200_000))
    house.sweep()
    house.save(expired, created_ms=NOW_MS - 90_000, ttl_seconds=60, recorded=False)
    connection = redis.Redis.from_url(house.url)
    for key in connection.scan_iter(match=f"gs:{{{house.engine}}}:*"):
        connection.delete(key)
    connection.close()
    house.sweep()
    record = house.record(RecordKind.CHECKPOINT, kept) or {}
    assert NOW_MS + 7_200_000 <= int(record["expires_ms"]) < NOW_MS + 7_201_000
    assert (record["tenant"], record["kind"], record["user_metadata"]) == ("local", "weights", '{"renderer_name": "r"}')
    assert house.record(RecordKind.CHECKPOINT, expired) is None
    assert not (house.output_dir / "checkpoints" / "s+train+0" / "weights" / "expired").exists()
    model = house.record(RecordKind.MODEL, "s:train:0") or {}
    assert (model["state"], model["session"], model["rank"]) == ("unloaded", "s", "4")

    async def check(intake: RedisIntake) -> None:
        listed = await intake.list_tenant(RecordKind.CHECKPOINT, ids.LOCAL_TENANT, offset=0, limit=9)
        assert list(listed.records) == [kept]

    house.with_intake(check)


def test_a_record_is_not_made_anew_in_a_redis_that_has_seen_the_disk(house):
    house.sweep()
    house.save("tinker://m/weights/deleted", recorded=False)
    house.sweep()
    assert house.record(RecordKind.CHECKPOINT, "tinker://m/weights/deleted") is None


def test_a_live_sessions_snapshots_out_of_use_are_collected_but_for_the_most_recent(house):
    long = UNUSED_S + 60
    old = [house.snapshot(number, unused_s=long + number) for number in range(3)]
    many = [house.snapshot(100 + number, unused_s=long - 59 - number / 100) for number in range(KEEP_SNAPSHOTS - 1)]
    fresh = house.snapshot(7)
    named = "s:sample:500"
    house.put(RecordKind.SAMPLER, named, tenant="local", session="s", model_path="tinker://m/sampler_weights/a")
    house.sweep()
    assert [path.exists() for path in old] == [False] * 3
    assert [house.record(RecordKind.SAMPLER, f"s:sample:{number}") for number in range(3)] == [None] * 3
    assert all(path.exists() for path in (*many, fresh))
    assert house.record(RecordKind.SAMPLER, named) is not None


def test_few_snapshots_of_a_live_session_stay_however_long_they_are_unused(house):
    paths = [house.snapshot(number, unused_s=9 * UNUSED_S) for number in range(KEEP_SNAPSHOTS)]
    house.sweep()
    assert all(path.exists() for path in paths)


def test_snapshots_without_a_record_go_when_they_are_old(house):
    old = house.snapshot(1, unused_s=UNUSED_S + 60, recorded=False)
    young = house.snapshot(2, recorded=False)
    house.sweep()
    assert (old.exists(), young.exists()) == (False, True)


def test_disk_use_is_written_down_for_each_tenant_and_in_all(house):
    house.save("tinker://m/weights/a", num_bytes=100)
    house.save("tinker://m/weights/b", num_bytes=10)
    house.save("tinker://n/sampler_weights/a", num_bytes=1000, tenant="other")
    house.snapshot(1)
    house.put(RecordKind.STORAGE, "gone", tenant="gone", num_checkpoints="7")
    house.sweep()
    local = house.record(RecordKind.STORAGE, "local") or {}
    names = ("num_checkpoints", "checkpoint_bytes", "num_snapshots", "snapshot_bytes")
    assert [local[name] for name in names] == ["2", "110", "1", "10"]
    assert (house.record(RecordKind.STORAGE, "other") or {})["checkpoint_bytes"] == "1000"
    total = house.record(RecordKind.STORAGE, TOTAL) or {}
    assert [total[name] for name in names] == ["3", "1110", "1", "10"]
    assert int(total["used_bytes"]) > 1120
    assert total["limit_bytes"] == str(1024**3)
    assert house.record(RecordKind.STORAGE, "gone") is None


def test_records_of_what_is_over_for_long_are_forgotten_but_for_models_with_checkpoints(house):
    long_ago = str(NOW_MS - int(1000 * RETENTION_S) - 60_000)
    over = {"tenant": "local", "created_ms": long_ago, "used_ms": long_ago, "queued": "0", "held": "0"}
    for session in ("gone", "kept"):
        house.put(RecordKind.SESSION, session, tenant="local", heartbeat_ms=long_ago, swept_ms=long_ago)
        house.put(RecordKind.MODEL, f"{session}:train:0", session=session, state="unloaded", **over)
    house.put(RecordKind.SESSION, "live", tenant="local", created_ms=long_ago, heartbeat_ms=str(NOW_MS))
    house.put(RecordKind.MODEL, "live:train:0", session="live", state="ready", **over)
    house.put(RecordKind.MODEL, "live:train:1", session="live", state="lost", **over)
    house.put(RecordKind.SAMPLER, "never:sample:0", tenant="local", session="never", created_ms=long_ago)
    house.save("tinker://kept:train:0/weights/a")
    house.sweep()
    models = ("gone:train:0", "kept:train:0", "live:train:0", "live:train:1")
    assert [model for model in models if house.record(RecordKind.MODEL, model)] == ["kept:train:0", "live:train:0"]
    sessions = ("gone", "kept", "live")
    assert [session for session in sessions if house.record(RecordKind.SESSION, session)] == ["kept", "live"]
    assert house.record(RecordKind.SAMPLER, "never:sample:0") is None


class Ticks:
    """A ticker on a clock that the test turns, before a queue that is worked off when the test says so."""

    def __init__(self, house: House, connection: "redis.Redis", *, ago_s: float) -> None:
        self._house = house
        self._queue = queue_for(house.engine, connection)
        self.clock = ManualClock(wall_ms=NOW_MS - int(1000 * ago_s))
        self._ticker = Ticker(self._queue, settings_file=house.settings, clock=self.clock)

    def tick(self, *, after_s: float = 0.0) -> None:
        """Let time pass, its ticks in time but the last one, which puts the tasks."""
        for _ in range(int(after_s) // 20):
            self.clock.advance(20)
            self._ticker.tick(1)
        self.clock.advance(after_s % 20)
        self._ticker.tick(0)

    def pause(self, *, for_s: float) -> None:
        """Let time pass without ticks, then put the tasks."""
        self.clock.advance(for_s)
        self._ticker.tick(0)

    def is_swept(self) -> bool:
        """Work off what is on the queue; whether session s1 was then swept."""
        work_off(self._queue)
        return "swept_ms" in (self._house.record(RecordKind.SESSION, "s1") or {})

    def beat(self, at_ms: int) -> None:
        """A heartbeat of session s1 at this time."""
        created = str(at_ms - 50_000)
        self._house.put(RecordKind.SESSION, "s1", tenant="local", created_ms=created, heartbeat_ms=str(at_ms))


@pytest.fixture
def connection(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as opened:
        yield opened


def test_after_a_pause_of_the_machine_silent_sessions_get_their_grace_again(house, connection):
    ticks = Ticks(house, connection, ago_s=5000)
    ticks.beat(NOW_MS - 6_000_000)
    ticks.pause(for_s=4000)
    assert not ticks.is_swept()
    # 300 s are session_grace_s.
    ticks.tick(after_s=300)
    assert not ticks.is_swept()
    ticks.tick(after_s=5)
    assert ticks.is_swept()


def test_a_task_that_waited_while_the_clock_jumped_takes_nobody_for_silent(house, connection):
    ticks = Ticks(house, connection, ago_s=4000)
    ticks.beat(NOW_MS - 4_000_000)
    ticks.tick()
    assert not ticks.is_swept()
    # The next tick sees the jump.
    ticks.pause(for_s=4000)
    assert not ticks.is_swept()


def test_a_task_that_waited_while_the_clock_was_put_back_takes_nobody_for_silent(house, connection):
    ticks = Ticks(house, connection, ago_s=-3600)
    ticks.tick(after_s=1000)
    ticks.beat(NOW_MS)
    assert not ticks.is_swept()


def test_a_task_that_an_earlier_version_left_on_the_queue_runs(house, connection):
    ticks = Ticks(house, connection, ago_s=0)
    queue = queue_for(house.engine, connection)
    (task,) = (task for task in TASKS if task.name == "sweep_sessions")
    put_once(queue, task.function, str(house.settings), 0, job_id="earlier", timeout_s=60, failure_ttl_s=60)
    ticks.beat(NOW_MS - 6_000_000)
    assert ticks.is_swept()


@pytest.mark.config_field("idle_session_timeout", "session_grace_s")
@pytest.mark.parametrize(
    ("given", "swept"),
    [({}, []), ({"session_grace_s": 5}, ["beats"]), ({"idle_session_timeout": 5}, ["never-beat"])],
    ids=["defaults", "grace", "idle"],
)
def test_how_long_a_session_may_be_silent_is_what_the_settings_say(tmp_path, redis_url, engine_name, given, swept):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **given)
    house = House(redis_url, engine_name, settings)
    silent = str(NOW_MS - 20_000)
    house.put(RecordKind.SESSION, "beats", tenant="local", created_ms=str(NOW_MS - 30_000), heartbeat_ms=silent)
    house.put(RecordKind.SESSION, "never-beat", tenant="local", created_ms=silent, heartbeat_ms=silent)
    house.sweep()
    sessions = ("beats", "never-beat")
    assert [name for name in sessions if "swept_ms" in (house.record(RecordKind.SESSION, name) or {})] == swept
