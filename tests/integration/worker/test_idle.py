"""A model that its client left is saved, then unloaded; nothing that is in use, or not saved, goes."""

import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.cards import UNIFORM_CARD
from tests.support.echo_worker import EchoWorker, echo_worker

from gradstream.shared import codec
from gradstream.shared.errors import QueueFull
from gradstream.shared.ids import LOCAL_TENANT, ModelId
from gradstream.shared.joblog.census import RedisCensus
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import Receipt, RecordKind, Submission
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import AdamParams, CreateModel, LoraSpec, OptimStep, Payload
from gradstream.worker.idle import sweep_idle
from gradstream.worker.storage import Storage
from gradstream.worker.sweeps import Parts

IDLE_S = 100.0
_WAIT_S = 60.0


class Refusing(RedisIntake):
    """An intake that has no room for the first job it is given."""

    num_refused = 0

    async def submit(self, submission: Submission) -> Receipt:
        if not self.num_refused:
            self.num_refused += 1
            raise QueueFull("full", retry_after_s=1.0)
        return await super().submit(submission)


@dataclass
class House:
    """A queue with a worker. later_s: how far the clock of the sweep is ahead."""

    url: str
    engine: str
    intake: RedisIntake
    census: RedisCensus
    worker: EchoWorker
    output_dir: Path
    later_s: float = 0.0

    async def submit(self, model: str, payload: Payload, **fields: object) -> None:
        """Return when the job is done."""
        job = Submission(
            owner=ModelId(model),
            seq=None,
            op=codec.op_of(payload),
            tenant=LOCAL_TENANT,
            payload=codec.encode(payload),
            **fields,
        )
        receipt = await self.intake.submit(job)
        view = await self.intake.wait(receipt.future_id, timeout_s=_WAIT_S)
        assert view is not None
        assert view.outcome is not None

    async def make(self, model: str, *, num_steps: int = 1) -> None:
        """A model with so many steps."""
        fields = {
            "dialect": "xorl",
            "name": model,
            "session": model,
            "tenant": LOCAL_TENANT,
            "created_ms": str(time.time_ns() // 10**6),
        }
        create = CreateModel(session_id=model, base_model="tests/uniform", lora=LoraSpec(rank=8))
        await self.submit(model, create, model_record=fields)
        for _ in range(num_steps):
            await self.submit(model, OptimStep(adam=AdamParams()))

    async def sweep(self, *, awake_ms: int = 0) -> int:
        """Sweep once; return when the jobs of the sweep are done."""
        now_ms = time.time_ns() // 10**6 + int(1000 * self.later_s)
        parts = Parts(census=self.census, intake=self.intake, storage=Storage(self.output_dir), now_ms=now_ms)
        num_jobs = await sweep_idle(parts, idle_s=IDLE_S, awake_ms=awake_ms)
        deadline = time.monotonic() + _WAIT_S
        while any(int(record.get("queued", "0")) for _, record in self.census.records(RecordKind.MODEL)):
            self.worker.check()
            assert time.monotonic() < deadline
        return num_jobs

    def record(self, model: str) -> dict[str, str]:
        record = self.census.record(RecordKind.MODEL, model)
        assert record is not None
        return record

    def ops(self, model: str) -> list[str]:
        return [op for owner, _, op in self.worker.seen if owner == model]


@pytest.fixture
def worker(redis_url: str, engine_name: str) -> Iterator[EchoWorker]:
    with echo_worker(redis_url, engine=engine_name, card=UNIFORM_CARD) as running:
        yield running


@pytest.fixture
async def house(worker: EchoWorker, redis_url: str, engine_name: str, tmp_path: Path) -> AsyncIterator[House]:
    async with RedisIntake(redis_url, engine=engine_name, limits=Limits()) as intake:
        with RedisCensus(redis_url, engine=engine_name) as census:
            yield House(
                url=redis_url, engine=engine_name, intake=intake, census=census, worker=worker, output_dir=tmp_path
            )


async def test_an_idle_model_is_saved_first_and_unloaded_then(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 1
    assert await house.sweep() == 1
    assert house.record("policy")["state"] == "ready"
    saved = house.record("policy")["last_checkpoint"]
    assert saved.startswith("tinker://policy/weights/idle_2")
    assert await house.sweep() == 1
    assert house.record("policy")["state"] == "unloaded"
    assert house.ops("policy") == ["create_model", "optim_step", "save_weights", "unload_model"]
    assert await house.sweep() == 0


async def test_a_model_that_was_used_a_moment_ago_stays(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S / 2
    assert await house.sweep() == 0


async def test_silence_counts_from_when_the_server_could_hear(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 50
    assert await house.sweep(awake_ms=time.time_ns() // 10**6 + 100_000) == 0


@pytest.mark.parametrize("sign", ["seen_ms", "done_ms"])
async def test_a_result_that_came_or_was_fetched_is_a_sign_of_life(house: House, sign: str) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 50
    moment = time.time_ns() // 10**6 + 1000 * 100
    await house.intake.change_record(RecordKind.MODEL, "policy", {sign: str(moment)})
    assert await house.sweep() == 0


async def test_a_job_that_waits_or_runs_is_no_idleness_however_long_it_takes(house: House) -> None:
    await house.make("policy")
    house.worker.pause()
    job = OptimStep(adam=AdamParams())
    submission = Submission(
        owner=ModelId("policy"), seq=None, op="optim_step", tenant=LOCAL_TENANT, payload=codec.encode(job)
    )
    await house.intake.submit(submission)
    parts = Parts(
        census=house.census,
        intake=house.intake,
        storage=Storage(house.output_dir),
        now_ms=time.time_ns() // 10**6 + 10**9,
    )
    assert await sweep_idle(parts, idle_s=IDLE_S, awake_ms=0) == 0
    house.worker.resume()


async def test_who_trains_on_between_save_and_unload_keeps_the_model(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 1
    await house.sweep()
    await house.submit("policy", OptimStep(adam=AdamParams()))
    house.later_s = 0.0
    assert await house.sweep() == 0
    assert house.record("policy")["state"] == "ready"


async def test_who_shows_a_sign_of_life_after_the_save_keeps_the_model_until_idle_again(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 1
    await house.sweep()
    back_ms = time.time_ns() // 10**6 + int(1000 * (IDLE_S + 5))
    await house.intake.change_record(RecordKind.MODEL, "policy", {"seen_ms": str(back_ms)})
    house.later_s = IDLE_S + 10
    assert await house.sweep() == 0
    house.later_s = 2 * IDLE_S + 10
    assert await house.sweep() == 1
    assert house.record("policy")["state"] == "unloaded"


async def test_a_model_whose_checkpoint_is_missing_is_not_unloaded(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 1
    await house.sweep()
    await house.intake.remove_record(RecordKind.CHECKPOINT, house.record("policy")["last_checkpoint"])
    house.later_s = IDLE_S / 2
    assert await house.sweep() == 0
    assert house.record("policy")["state"] == "ready"


async def test_a_model_that_was_never_trained_goes_without_a_checkpoint(house: House) -> None:
    await house.make("policy", num_steps=0)
    house.later_s = IDLE_S + 1
    assert await house.sweep() == 1
    assert house.ops("policy") == ["create_model", "unload_model"]


async def test_the_model_that_needs_no_making_is_saved_once_and_stays(house: House) -> None:
    await house.make("default")
    house.later_s = IDLE_S + 1
    assert await house.sweep() == 1
    house.later_s = 3 * IDLE_S
    assert await house.sweep() == 0
    assert house.record("default")["state"] == "ready"


async def test_a_model_that_was_unloaded_so_can_be_made_again_and_is_swept_again(house: House) -> None:
    await house.make("policy")
    house.later_s = IDLE_S + 1
    await house.sweep()
    await house.sweep()
    await house.make("policy")
    assert house.record("policy")["state"] == "ready"
    house.later_s = 2 * IDLE_S
    await house.sweep()
    await house.sweep()
    assert house.ops("policy")[-2:] == ["save_weights", "unload_model"]


async def test_unread_results_do_not_keep_an_idle_model_in_memory(house: House) -> None:
    await house.make("policy")
    house.later_s = 2 * IDLE_S
    async with RedisIntake(house.url, engine=house.engine, limits=Limits(max_unread_bytes_per_tenant=0)) as intake:
        house.intake = intake
        for _ in range(2):
            await house.sweep()
    assert house.ops("policy")[-2:] == ["save_weights", "unload_model"]


async def test_a_model_that_the_queue_refuses_keeps_no_other_from_its_turn(house: House) -> None:
    for model in ("one", "two", "three"):
        await house.make(model)
    house.later_s = 2 * IDLE_S
    intake = Refusing(house.url, engine=house.engine, limits=Limits())
    async with intake:
        house.intake = intake
        assert await house.sweep() == 2
    assert intake.num_refused == 1


async def test_models_of_the_other_dialect_are_left_to_their_sessions(house: House) -> None:
    await house.make("policy")
    await house.intake.change_record(RecordKind.MODEL, "policy", {"dialect": ""})
    house.later_s = IDLE_S + 1
    assert await house.sweep() == 0
