"""Gangs that die, and successors that go on to the same bits."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import redis
from tests.support.gang import (
    BASE_MODEL,
    READY_S,
    Client,
    forward_backward,
    gang,
    optim_step,
    output_dir,
    settings_file,
)
from tests.support.polling import until
from tests.support.recovery import STRICT, freeze, kill, program, train, uninterrupted, weights_of

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared import codec
from gradstream.shared.config import EXIT_CONFIG
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.port import RecordKind, Submission
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    CreateModel,
    Failed,
    ForwardBackwardDone,
    LoadWeights,
    LoraSpec,
    Outcome,
    Payload,
    SaveWeights,
    UnloadModel,
)
from gradstream.worker.disklog.frames import LoggedJob
from gradstream.worker.disklog.log import DiskLog


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


async def test_a_run_over_three_killed_gangs_ends_with_the_bits_of_one_that_nobody_killed(
    client, tmp_path, redis_url, engine_name
):
    jobs = program(8)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs)
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT)
    outcomes: list[Outcome] = []
    model = None
    # Killed in the middle of an accumulation, after a snapshot or before one, with jobs of the next part already accepted.
    for part in (jobs[:5], jobs[5:6], jobs[6:16]):
        with gang(settings) as process:
            if model is None:
                model, _ = await client.create()
            outcomes += await train(client, model, part)
            kill(process)
    with gang(settings):
        outcomes += await train(client, model, jobs[16:])
        weights = await weights_of(client, model, settings, "end")
    assert outcomes == expected[0]
    assert weights == expected[1]
    record = await client.intake.record(RecordKind.MODEL, model)
    assert (record["state"], record["applied"]) == ("ready", str(len(jobs) + 1))


async def test_a_checkpoint_that_was_loaded_and_then_deleted_is_not_needed_again(
    client, tmp_path, redis_url, engine_name
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, snapshot_replay_budget_s=1e6)
    with gang(settings) as process:
        model, _ = await client.create()
        (*_, saved) = await train(client, model, [*program(1), SaveWeights(name="a")])
        later = await train(
            client, model, [*program(1), LoadWeights(path=saved.path, with_optimizer=True), *program(1)]
        )
        directory = parse_uri(saved.path).directory(output_dir(settings))
        directory.rename(directory.with_name("gone"))
        kill(process)
    with gang(settings):
        again = await train(client, model, program(1))
    assert not any(isinstance(outcome, Failed) for outcome in [*later, *again])


@pytest.mark.config_field("recovery")
async def test_without_recovery_a_dead_gangs_models_are_lost_and_say_where_their_checkpoint_is(
    client, tmp_path, redis_url, engine_name
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, recovery="none")
    with gang(settings) as process:
        model, _ = await client.create()
        (*_, saved) = await train(client, model, [*program(1), SaveWeights(name="a")])
        kill(process)
    with gang(settings):
        (lost,) = await train(client, model, [optim_step()])
    assert isinstance(lost, Failed)
    assert lost.code == "model_lost"
    assert saved.path in lost.message


async def test_a_redis_that_lost_everything_is_filled_again_from_the_log_on_disk(
    client, tmp_path, redis_url, engine_name
):
    jobs = program(4)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs)
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT)
    with gang(settings) as process:
        model, _ = await client.create()
        futures = [await client.submit(model, job) for job in jobs[:7]]
        outcomes = await client.outcomes(futures)
        freeze(process)
        # Read by nobody, and so known to Redis alone: the client has to send it again.
        lost = await client.submit(model, jobs[7])
        process.kill()
        process.wait()
    with redis.Redis.from_url(redis_url) as raw:
        for key in raw.scan_iter(f"gs:{{{engine_name}}}:*"):
            raw.delete(key)
    with gang(settings):
        assert await client.outcomes(futures) == outcomes
        assert await client.intake.future(lost) is None
        record = await client.intake.record(RecordKind.MODEL, model)
        assert (record["state"], record["next_seq"], record["session"]) == ("ready", "8", client.session)
        await client.submit_at(model, 8, jobs[7])
        outcomes += [await client.outcome(lost), *await train(client, model, jobs[8:])]
        weights = await weights_of(client, model, settings, "end")
    assert outcomes == expected[0]
    assert weights == expected[1]


def keys_of(raw: "redis.Redis", engine: str) -> list[bytes]:
    return list(raw.scan_iter(f"gs:{{{engine}}}:*"))


def numbered(payload: Payload, *, retry_key: str = "", record: dict[str, str] | None = None) -> Submission:
    """A job of a model whose jobs the server numbers."""
    return Submission(
        owner=ModelId("named"),
        seq=None,
        op=codec.op_of(payload),
        tenant=LOCAL_TENANT,
        payload=codec.encode(payload),
        model_record=record,
        retry_key=retry_key,
    )


def creation(rank: int) -> Submission:
    payload = CreateModel(session_id="named", base_model=BASE_MODEL, lora=LoraSpec(rank=rank, seed=1))
    record = {
        "session": "named",
        "tenant": LOCAL_TENANT,
        "base_model": BASE_MODEL,
        "rank": str(rank),
        "created_ms": "1",
    }
    return numbered(payload, record=record)


async def test_after_redis_was_lost_a_model_made_twice_is_the_second_one_and_a_repeated_request_is_no_new_job(
    client, tmp_path, redis_url, engine_name
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT)
    step = numbered(optim_step(), retry_key="3")
    with gang(settings) as process:
        for one in (creation(4), numbered(UnloadModel()), creation(8), numbered(forward_backward(12)), step):
            last = (await client.intake.submit(one)).future_id
        outcome = await client.outcome(last)
        kill(process)
    with redis.Redis.from_url(redis_url) as raw:
        for key in keys_of(raw, engine_name):
            raw.delete(key)
    with pytest.raises(Unavailable, match="recovering"):
        await client.intake.submit(numbered(optim_step()))
    with gang(settings):
        record = await client.intake.record(RecordKind.MODEL, "named")
        assert (record["state"], record["rank"], record["tail"], record["made_at"]) == ("ready", "8", "live", "2")
        again = await client.intake.submit(numbered(optim_step(), retry_key="3"))
        assert (again.future_id, again.is_duplicate) == (last, True)
        assert await client.outcome(last) == outcome
        new = await client.intake.submit(numbered(optim_step()))
        assert new.future_id == "named:5"
        assert await client.outcome(new.future_id)


async def test_what_got_a_logged_jobs_seq_from_a_redis_that_was_put_back_in_time_fails_and_never_runs(
    client, tmp_path, redis_url, engine_name
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT)
    raw = redis.Redis.from_url(redis_url)
    with gang(settings) as process:
        await client.outcome((await client.intake.submit(creation(4))).future_id)
        image = {key: raw.dump(key) for key in keys_of(raw, engine_name) if not key.endswith(b":lease")}
        await client.outcome((await client.intake.submit(numbered(forward_backward(12)))).future_id)
        kill(process)
    for key in keys_of(raw, engine_name):
        raw.delete(key)
    for key, value in image.items():
        raw.restore(key, 0, value)
    # Another API process, which knows of nothing that came after the image.
    async with RedisIntake(redis_url, engine=engine_name) as fresh:
        other = await fresh.submit(numbered(forward_backward(20)))
        assert other.future_id == "named:1"
        with gang(settings):
            outcome = await client.outcome(other.future_id)
            assert isinstance(outcome, Failed)
            assert "lost while the queue was recovering" in outcome.message
            sent_again = await fresh.submit(numbered(forward_backward(20)))
            done = await client.outcome(sent_again.future_id)
            assert sent_again.future_id == "named:2"
            assert isinstance(done, ForwardBackwardDone)
            assert np.frombuffer(done.outputs["logprobs"].lengths, "<i8").tolist() == [20]
    raw.close()


def logged(log: DiskLog) -> set[FutureId]:
    """The jobs that the log on disk has."""
    return {frame.job.future_id for _, frame in log.scan() if isinstance(frame, LoggedJob)}


async def test_open_jobs_that_redis_lost_are_run(client, tmp_path, redis_url, engine_name):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, operation_timeout_s=600)
    with gang(settings) as process:
        model, _ = await client.create()
        await train(client, model, program(1))
        futures = [await client.submit(model, forward_backward(*[400] * 20, seed=n)) for n in range(6)]
        log = DiskLog(output_dir(settings) / "joblog" / engine_name)
        await until(lambda: logged(log).issuperset(futures))
        process.kill()
        process.wait()
    with redis.Redis.from_url(redis_url) as raw:
        for key in raw.scan_iter(f"gs:{{{engine_name}}}:*"):
            raw.delete(key)
    with gang(settings):
        outcomes = await client.outcomes(futures)
    assert [type(outcome) for outcome in outcomes] == [ForwardBackwardDone] * len(futures)


async def test_what_a_power_cut_took_from_the_disk_comes_back_from_redis(client, tmp_path, redis_url, engine_name):
    jobs = program(4)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs)
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **{**STRICT, "snapshot_idle_s": 600})
    with gang(settings) as process:
        model, _ = await client.create()
        outcomes = await train(client, model, jobs[:8])
        kill(process)
    (segment,) = (output_dir(settings) / "joblog" / engine_name).glob("*.seg")
    with segment.open("r+b") as file:
        file.truncate(segment.stat().st_size // 2)
    with gang(settings):
        outcomes += await train(client, model, jobs[8:])
        weights = await weights_of(client, model, settings, "end")
    assert outcomes == expected[0]
    assert weights == expected[1]


@pytest.mark.parametrize("has_journal", [True, False])
async def test_a_log_damaged_in_the_middle_is_set_aside_and_made_anew_from_redis_if_that_has_it_all(
    client, tmp_path, redis_url, engine_name, has_journal
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, snapshot_idle_s=600)
    with gang(settings) as process:
        model, _ = await client.create()
        await train(client, model, [*program(2), SaveWeights(name="a"), *program(1)])
        kill(process)
    (segment,) = (output_dir(settings) / "joblog" / engine_name).glob("*.seg")
    with segment.open("r+b") as file:
        file.seek(segment.stat().st_size // 2)
        file.write(b"\xff" * 8)
    if not has_journal:
        with redis.Redis.from_url(redis_url) as raw:
            raw.delete(f"gs:{{{engine_name}}}:journal")
    with gang(settings):
        (after,) = await train(client, model, [optim_step()])
        other, created = await client.create(2)
        await client.outcome(created)
        again = await train(client, other, program(1))
    if has_journal:
        assert after.metrics["step"] == 4.0
    else:
        assert after.code == "model_lost"
        record = await client.intake.record(RecordKind.MODEL, model)
        assert "Redis has the journal up to" in record["error"]
    assert not any(isinstance(outcome, Failed) for outcome in again)
    assert list((output_dir(settings) / "joblog").glob("*.damaged-*"))


@pytest.mark.parametrize(
    ("mode", "is_lost"), [(("exact", 1.0), True), (("tolerant", 1e-12), True), (("tolerant", 1e-2), False)]
)
async def test_a_model_that_does_not_come_out_as_it_was_is_lost_unless_that_is_tolerated(
    client, tmp_path, redis_url, engine_name, mode, is_lost
):
    given = {"snapshot_idle_s": 600, "recovery": mode[0], "recovery_tolerance": mode[1]}
    before = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, attn_implementation="sdpa", **given)
    with gang(before) as process:
        model, _ = await client.create()
        await train(client, model, program(3))
        kill(process)
    # Another attention: what the replay gives differs in its bits from what had been given.
    after = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, attn_implementation="eager", **given)
    with gang(after):
        (outcome,) = await train(client, model, [optim_step()])
    assert isinstance(outcome, Failed) is is_lost
    if is_lost:
        assert outcome.code == "model_lost"
        record = await client.intake.record(RecordKind.MODEL, model)
        assert record["error"].startswith("in batch 1-")


async def test_a_config_under_which_the_jobs_to_run_again_would_be_others_is_refused_until_they_are_in_a_snapshot(
    client, tmp_path, redis_url, engine_name
):
    def settings(alpha: int) -> Path:
        given = {**STRICT, "snapshot_idle_s": 600, "lora_alpha": alpha}
        return settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **given)

    jobs = program(3)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs, lora_alpha=32)
    with gang(settings(32)) as process:
        model, _ = await client.create()
        outcomes = await train(client, model, jobs[:4])
        kill(process)
    # The second one, too: what the first one noted of itself changes nothing.
    for _ in range(2):
        log = tmp_path / "refused.log"
        with gang(settings(16), log=log, leads=False) as refused:
            assert refused.wait(timeout=READY_S) == EXIT_CONFIG
        told = log.read_text().splitlines()[-1]
        assert f"jobs of {model} must run again" in told
        assert "lora_alpha was 32.0 and is 16.0. Start with what it was, stop with Ctrl-C" in told
    with gang(settings(32)):
        outcomes += await train(client, model, jobs[4:5])
    with gang(settings(16)):
        outcomes += await train(client, model, jobs[5:])
    assert outcomes == expected[0]


async def test_a_snapshot_of_a_batch_that_was_never_logged_and_gangs_that_die_idle_change_nothing(
    client, tmp_path, redis_url, engine_name
):
    jobs = program(4)
    expected = await uninterrupted(tmp_path, redis_url, engine_name, jobs)
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **STRICT)
    directory = output_dir(settings)
    with gang(settings) as process:
        model, _ = await client.create()
        outcomes = await train(client, model, jobs[:4])
        await until(lambda: SnapshotStore(directory / "snapshots" / engine_name).cuts())
        outcomes += await train(client, model, jobs[4:5])
        kill(process)
    # As a gang leaves it that dies between the snapshot after a load_weights and the log of that batch.
    store = SnapshotStore(directory / "snapshots" / engine_name)
    newest = store.cuts()[0]
    store.continue_from(newest)
    end = DiskLog(directory / "joblog" / engine_name).tail().end
    head = msgspec.structs.replace(newest.head, number=10**6, log_segment=end.segment, log_offset=end.offset)
    store.write(head, [], live=newest.models.keys())
    for _ in range(2):
        with gang(settings) as process:
            # Longer than snapshot_idle_s.
            await asyncio.sleep(1)
            kill(process)
    with gang(settings):
        outcomes += await train(client, model, jobs[5:])
        weights = await weights_of(client, model, settings, "end")
    assert outcomes == expected[0]
    assert weights == expected[1]
