"""Jobs go in, outcomes come out: a real gang on a real job log, killed and replaced."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.gang import Client, forward_backward, gang, optim_step, output_dir, settings_file
from tests.support.recovery import freeze

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared import ids
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    CreateModelDone,
    DeleteCheckpoint,
    DeleteCheckpointDone,
    ForwardBackwardDone,
    OptimStepDone,
    SampleDone,
    SaveForSampler,
    SaveForSamplerDone,
    SaveWeights,
    SaveWeightsDone,
    UnloadModel,
    UnloadModelDone,
)
from gradstream.worker.fence import EXIT_FENCED
from gradstream.worker.rescan import MARK
from gradstream.worker.storage import Storage

pytestmark = [pytest.mark.slow]


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, engine_name: str) -> Path:
    return settings_file(tmp_path, redis_url=redis_url, engine=engine_name)


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


async def test_two_models_train_side_by_side_and_every_job_gets_its_own_kind_of_outcome(settings, client):
    futures, expected = [], []
    models = []
    for number in (1, 2):
        model, created = await client.create(number)
        models.append(model)
        futures.append(created)
        expected.append(CreateModelDone)
    for _ in range(3):
        for model in models:
            futures.append(await client.submit(model, forward_backward(12, 7)))
            futures.append(await client.submit(model, optim_step()))
            expected += [ForwardBackwardDone, OptimStepDone]
    with gang(settings):
        outcomes = await client.outcomes(futures)
    assert [type(outcome) for outcome in outcomes] == expected
    losses = [one.metrics["loss:sum"] for one in outcomes if isinstance(one, ForwardBackwardDone)]
    assert losses[4] < losses[2] < losses[0]
    record = await client.intake.record(RecordKind.MODEL, models[0])
    assert (record["state"], record["applied"], record["queued"]) == ("ready", "6", "0")


async def test_a_gang_killed_in_the_middle_goes_on_with_what_was_accepted(settings, client):
    model, created = await client.create()
    with gang(settings) as first:
        futures = [await client.submit(model, forward_backward(12)), await client.submit(model, optim_step())]
        futures.append(await client.submit(model, SaveWeights(name="kept")))
        sampler = ids.sampler_id(client.session, 1)
        futures.append(await client.submit(model, SaveForSampler(sampler_id=sampler, session_id=client.session)))
        saved, sampled = (await client.outcomes([created, *futures]))[3:]
        assert isinstance(saved, SaveWeightsDone)
        assert isinstance(sampled, SaveForSamplerDone)
        path = (await client.intake.record(RecordKind.SAMPLER, sampler))["model_path"]
        before = await client.outcome(await client.sample(path, 1))
        assert isinstance(before, SampleDone)
        late = [await client.submit(model, forward_backward(300, 300, seed=n)) for n in range(20)]
        late.append(await client.submit(model, optim_step()))
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
    late_sample = await client.sample(path, 2)
    late_create = (await client.create(2))[1]
    with gang(settings):
        outcomes = await client.outcomes(late)
        assert [type(outcome) for outcome in outcomes] == [ForwardBackwardDone] * 20 + [OptimStepDone]
        assert await client.outcome(late_sample) == before
        assert isinstance(await client.outcome(late_create), CreateModelDone)
        last = await client.outcome(await client.submit(model, optim_step()))
        assert last.metrics["step"] == 3.0
    assert (await client.intake.record(RecordKind.MODEL, model))["state"] == "ready"


async def test_sigterm_finishes_the_batch_gives_the_lease_back_and_exits_cleanly(settings, client):
    _, created = await client.create()
    with gang(settings) as process:
        await client.outcome(created)
        assert await client.intake.is_worker_alive()
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert not await client.intake.is_worker_alive()


async def test_a_paused_leader_that_was_replaced_exits_without_committing(settings, client):
    model, created = await client.create()
    with gang(settings) as zombie:
        await client.outcome(created)
        freeze(zombie)
        first = await client.submit(model, forward_backward(12))
        with gang(settings):
            await client.ready(epoch=2)
            outcome = await client.outcome(first)
            assert isinstance(outcome, ForwardBackwardDone)
            os.kill(zombie.pid, signal.SIGCONT)
            assert zombie.wait(timeout=60) == EXIT_FENCED
            assert await client.outcome(first) == outcome
            second = (await client.create(2))[1]
            assert isinstance(await client.outcome(second), CreateModelDone)


async def test_another_launchers_gang_waits_for_the_lease(settings, client, tmp_path, redis_url, engine_name):
    _, created = await client.create()
    other_dir = tmp_path / "other"
    other_dir.mkdir()
    other = settings_file(
        other_dir, redis_url=redis_url, engine=engine_name, owner="launcher-2", worker_connection_timeout=1
    )
    with gang(settings):
        await client.outcome(created)
        with gang(other, leads=False) as second:
            assert second.wait(timeout=120) == 1
    assert "serves this engine" in other.with_suffix(".log").read_text()


async def test_a_checkpoint_is_deleted_behind_the_jobs_before_it_also_after_its_model_was_unloaded(settings, client):
    model, _ = await client.create()
    path = f"tinker://{model}/weights/a"
    futures = [
        await client.submit(model, SaveWeights(name="a")),
        await client.submit(model, UnloadModel()),
        await client.beside(model, DeleteCheckpoint(path=path)),
    ]
    with gang(settings):
        assert await client.outcomes(futures) == [
            SaveWeightsDone(path=path),
            UnloadModelDone(model_id=model),
            DeleteCheckpointDone(path=path),
        ]
        assert await client.intake.record(RecordKind.CHECKPOINT, path) is None
    assert not parse_uri(path).directory(output_dir(settings)).exists()


async def test_unloading_frees_the_model_and_later_jobs_say_so(settings, client):
    model, _ = await client.create()
    unload = await client.submit(model, UnloadModel())
    late = await client.submit(model, optim_step())
    with gang(settings):
        assert isinstance(await client.outcome(unload), UnloadModelDone)
        outcome = await client.outcome(late)
    assert (outcome.code, outcome.category) == ("unknown_model", "user")


async def test_a_model_that_cannot_be_read_is_one_sentence_and_exit_78(tmp_path, redis_url, engine_name):
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, model_path=broken)
    with gang(settings, leads=False) as process:
        assert process.wait(timeout=120) == 78
    log = settings.with_suffix(".log").read_text()
    assert "Traceback" not in log


async def test_a_save_that_no_record_knows_gives_its_name_to_the_next_and_a_recorded_one_does_not(settings, client):
    model, _ = await client.create()
    path = f"tinker://{model}/weights/a"
    with gang(settings):
        first = await client.outcome(await client.submit(model, SaveWeights(name="a")))
        assert isinstance(first, SaveWeightsDone)
        taken = await client.outcome(await client.submit(model, SaveWeights(name="a")))
        assert (taken.code, taken.category) == ("checkpoint_exists", "user")
        # As if the gang had died before that commit.
        assert await client.intake.remove_record(RecordKind.CHECKPOINT, path)
        unknown = await client.outcome(await client.submit(model, SaveWeights(name="a")))
        assert unknown.code == "checkpoint_exists", "a Redis that nobody has scanned the disk for proves nothing"
        await client.intake.put_record(RecordKind.STORAGE, MARK, {"scanned_ms": "1"})
        again = await client.submit(model, SaveWeights(name="a"))
        assert isinstance(await client.outcome(again), SaveWeightsDone)
    assert Storage(output_dir(settings)).manifest(path).job == again
    assert await client.intake.record(RecordKind.CHECKPOINT, path) is not None
