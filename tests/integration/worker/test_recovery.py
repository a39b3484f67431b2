"""Gangs that die, and successors that go on to the same bits."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tests.support.gang import Client, forward_backward, gang, optim_step, output_dir, settings_file

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.shared.ids import ModelId
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Failed, LoadWeights, Outcome, Payload, SaveWeights, SaveWeightsDone

pytestmark = [pytest.mark.timeout(400)]

STRICT = {"batch_isolation": "strict", "snapshot_idle_s": 0.2}


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


def program(steps: int) -> list[Payload]:
    """Two accumulated passes and a step, several times."""
    jobs: list[Payload] = []
    for step in range(steps):
        jobs += [forward_backward(12, 7, seed=step), forward_backward(30, seed=100 + step), optim_step()]
    return jobs


async def train(client: Client, model: ModelId, jobs: list[Payload]) -> list[Outcome]:
    return await client.outcomes([await client.submit(model, job) for job in jobs])


async def weights_of(client: Client, model: ModelId, settings: Path, name: str) -> dict[str, bytes]:
    """Every file of a checkpoint that is saved now, tensor by tensor."""
    (saved,) = await train(client, model, [SaveWeights(name=name)])
    assert isinstance(saved, SaveWeightsDone), saved
    directory = parse_uri(saved.path).directory(output_dir(settings))
    return {
        f"{path.name}/{key}": value.tobytes()
        for path in sorted(directory.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


async def uninterrupted(tmp_path: Path, redis_url: str, engine: str, jobs: list[Payload]):
    """Outcomes and weights of a run that nobody disturbs, on an engine of its own."""
    directory = tmp_path / "uninterrupted"
    directory.mkdir()
    settings = settings_file(directory, redis_url=redis_url, engine=f"{engine}-calm", **STRICT)
    async with RedisIntake(redis_url, engine=f"{engine}-calm") as intake:
        calm = Client(intake)
        with gang(settings):
            model, _ = await calm.create()
            outcomes = await train(calm, model, jobs)
            return outcomes, await weights_of(calm, model, settings, "end")


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


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
