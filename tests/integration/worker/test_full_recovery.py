"""Gangs that train full weights: killed ones go on to the same bits, and their log can be replayed, searched and dumped."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file
from tests.support.gang import READY_S, TINY, Client, forward_backward, gang, optim_step, output_dir, settings_file
from tests.support.golden import found, replayed
from tests.support.snapshots import assert_same_state

from gradstream.engine.snapshot.state import ModelState
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import SystemClock
from gradstream.shared.columns import Column
from gradstream.shared.config import EXIT_CONFIG
from gradstream.shared.ids import DEFAULT_MODEL, ModelId, SessionId
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import (
    IGNORE,
    CreateModel,
    Failed,
    ForwardBackward,
    OffloadModel,
    Outcome,
    Payload,
    ResetModel,
    UnloadModel,
)
from gradstream.worker.disklog.archive import export_log
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import Choice

MODEL = ModelId(DEFAULT_MODEL)
FULL = {"enable_lora": False, "snapshot_idle_s": 0.2}
WAYS = {
    "float32": {},
    "bfloat16": {"enable_mixed_precision": True},
    "no master": {"enable_mixed_precision": True, "master_dtype": "bf16"},
}


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


def create() -> CreateModel:
    return CreateModel(session_id=SessionId("s1"), base_model="tiny", lora=None, reduction="token_mean")


def with_prompt(payload: ForwardBackward, length: int) -> ForwardBackward:
    """The payload with no targets for the first tokens of every datum."""
    targets = [array.copy() for array in payload.inputs["target_tokens"].arrays()]
    for one in targets:
        one[:length] = IGNORE
    return msgspec.structs.replace(payload, inputs={"target_tokens": Column.of(targets, dtype="int64")})


def program(steps: int) -> list[Payload]:
    """Two accumulated passes and a step, several times; a reset of the optimizer, and a nap, among them."""
    jobs: list[Payload] = []
    for step in range(steps):
        jobs += [with_prompt(forward_backward(12, 7, seed=step), 4), forward_backward(30, seed=100 + step)]
        jobs += [OffloadModel(asleep=True), OffloadModel(asleep=False)] if step == 2 else []
        jobs += [optim_step()]
        jobs += [ResetModel()] if step == 3 else []
    return jobs


async def train(client: Client, jobs: list[Payload]) -> list[Outcome]:
    outcomes = await client.outcomes([await client.submit(MODEL, job) for job in jobs])
    assert not any(isinstance(outcome, Failed) for outcome in outcomes), outcomes
    return outcomes


def last_state(settings: Path, engine: str) -> ModelState:
    """The model as the gang's clean end left it."""
    store = SnapshotStore(output_dir(settings) / "snapshots" / engine)
    cut = store.cuts()[0]
    store.verify(cut)
    return store.read(cut, MODEL)


async def uninterrupted(tmp_path: Path, redis_url: str, engine: str, jobs: list[Payload], **fields: object):
    """Outcomes and the last state of a run that nobody disturbs, on an engine of its own."""
    directory = tmp_path / "uninterrupted"
    directory.mkdir()
    settings = settings_file(directory, redis_url=redis_url, engine=f"{engine}-calm", **FULL, **fields)
    async with RedisIntake(redis_url, engine=f"{engine}-calm") as intake:
        calm = Client(intake)
        with gang(settings):
            await calm.create_full(create())
            outcomes = await train(calm, jobs)
    return outcomes, last_state(settings, f"{engine}-calm")


@pytest.mark.config_field("enable_lora", "enable_mixed_precision", "master_dtype")
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[pytest.mark.slow] if name == "no master" else [])
        for name, fields in WAYS.items()
    ],
)
async def test_a_run_over_three_killed_gangs_ends_with_the_bits_of_one_that_nobody_killed(
    client, tmp_path, redis_url, engine_name, fields
):
    jobs = program(6)
    expected, state = await uninterrupted(tmp_path, redis_url, engine_name, jobs, **fields)
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **FULL, **fields)
    outcomes: list[Outcome] = []
    # Killed in the middle of an accumulation, in its sleep, and after a reset.
    for number, part in enumerate((jobs[:4], jobs[4:9], jobs[9:15])):
        with gang(settings) as process:
            if not number:
                await client.create_full(create())
            outcomes += await train(client, part)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    with gang(settings):
        outcomes += await train(client, jobs[15:])
    assert outcomes == expected
    assert_same_state(last_state(settings, engine_name), state)


async def test_a_log_of_full_weights_is_replayed_searched_and_dumped(client, tmp_path, redis_url, engine_name):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, **{**FULL, "snapshot_idle_s": 1e6})
    server = ["--config", str(tmp_path / "config.yaml")]
    jobs = program(5)
    with gang(settings):
        await client.create_full(create())
        await train(client, jobs)
        await train(client, [UnloadModel()])
    everything = replayed(*server, "--from", "start")
    assert (everything.num_differing, everything.num_not_run) == (0, 0)
    assert everything.num_equal == len(jobs) + 2
    assert {"reset_model", "offload_model", "unload_model"} <= {job.op for job in everything.jobs}

    # What the log itself says is enough, beside the model's files.
    file = tmp_path / "run.gslog"
    export_log(DiskLog(output_dir(settings) / "joblog" / engine_name), file, choice=Choice(), clock=SystemClock())
    moved = replayed("--log", str(file), "--model-path", str(TINY))
    assert (moved.num_differing, moved.num_not_run) == (0, 0)

    grown = found(*server, "--expr", "exp_avg_sq.max() > 0", status=0)
    assert grown.future_id == f"{MODEL}:3"
    assert not found(*server, "--non-finite", status=1).found

    dump = tmp_path / "dump"
    replayed(*server, "--from", "start", "--to", f"{MODEL}:3", "--dump", str(dump))
    before = load_file(dump / "default.before.safetensors")
    after = load_file(dump / "default.after.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert before[f"grad.{name}"].any()
    assert f"grad.{name}" not in after
    assert before[f"weights.{name}"].shape == after[f"exp_avg.{name}"].shape
    assert not (before[f"weights.{name}"] == after[f"weights.{name}"]).all()


async def test_a_server_of_the_other_kind_does_not_start_on_models_that_it_would_lose_unless_they_are_given_up(
    client, tmp_path, redis_url, engine_name
):
    fields = {"redis_url": redis_url, "engine": engine_name}
    with gang(settings_file(tmp_path, **fields, **FULL)):
        await client.create_full(create())
        await train(client, program(1))
    log = tmp_path / "second.log"
    with gang(settings_file(tmp_path, **fields), log=log, leads=False) as wrong:
        assert wrong.wait(timeout=READY_S) == EXIT_CONFIG
    told = log.read_text().splitlines()[-1]
    assert "holds 1 model (the first is default) that this config cannot serve: they are of full weights" in told
    assert "--server.recovery none" in told

    with gang(settings_file(tmp_path, **fields, **FULL)):
        assert not isinstance(await client.outcome(await client.submit(MODEL, optim_step())), Failed)

    with gang(settings_file(tmp_path, **fields, recovery="none")):
        outcome = await client.outcome(await client.submit(MODEL, optim_step()))
    assert isinstance(outcome, Failed)
    assert outcome.code == "model_lost"
    with gang(settings_file(tmp_path, **fields)):
        model, created = await client.create()
        assert not isinstance(await client.outcome(created), Failed)
        assert model != MODEL


async def test_two_ranks_that_train_full_weights_go_on_after_a_kill(tmp_path, redis_url, engine_name):
    jobs = program(4)
    expected: list[Outcome] = []
    states: list[ModelState] = []
    for name in (f"{engine_name}-calm", engine_name):
        directory = tmp_path / name
        directory.mkdir()
        settings = settings_file(directory, redis_url=redis_url, engine=name, num_ranks=2, **FULL)
        outcomes: list[Outcome] = []
        async with RedisIntake(redis_url, engine=name) as intake:
            one = Client(intake)
            with gang(settings, num_ranks=2) as process:
                await one.create_full(create())
                outcomes += await train(one, jobs[:7])
                if name == engine_name:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                else:
                    outcomes += await train(one, jobs[7:])
            if name == engine_name:
                with gang(settings, num_ranks=2):
                    outcomes += await train(one, jobs[7:])
        states.append(last_state(settings, name))
        expected = expected or outcomes
    assert outcomes == expected
    assert_same_state(*states)
