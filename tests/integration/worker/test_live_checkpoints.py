"""Checkpoints through the whole server: the stock SDK, the API, a real gang that is stopped and started, and housekeeping."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis
import tinker
from tests.support.api_server import api_server
from tests.support.gang import BASE_MODEL, Client, gang, output_dir, settings_file
from tests.support.rig import LIMITS
from tests.support.rq_worker import work_off
from tinker import types

from gradstream.api.config import ApiConfig
from gradstream.shared.clock import SystemClock
from gradstream.shared.config import read_handover
from gradstream.shared.joblog.port import RecordKind
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.worker.housekeeping import TASKS, enqueue, queue_for

pytestmark = [pytest.mark.slow]
ADAM = types.AdamParams(learning_rate=1e-2, weight_decay=0.01)
PROMPT = types.ModelInput.from_ints([40, 41, 42, 43])
GREEDY = types.SamplingParams(max_tokens=8, temperature=0.0, seed=1)


@pytest.fixture
def settings(tmp_path: Path, redis_url: str, engine_name: str) -> Path:
    return settings_file(tmp_path, redis_url=redis_url, engine=engine_name)


@contextmanager
def serving(settings: Path, monkeypatch: pytest.MonkeyPatch, *, epoch: int = 1) -> Iterator[tinker.ServiceClient]:
    """An SDK client of an API whose gang is ready."""
    read = read_handover(settings)
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")

    async def ready() -> None:
        async with RedisIntake(str(read.redis_url), engine=read.engine_name) as intake:
            await Client(intake).ready(epoch=epoch)

    config = ApiConfig(output_dir=Path(read.output_dir))
    with (
        gang(settings),
        api_server(str(read.redis_url), engine=read.engine_name, config=config, limits=LIMITS) as base_url,
    ):
        asyncio.run(ready())
        client = tinker.ServiceClient(base_url=base_url)
        try:
            yield client
        finally:
            client.holder.close()


def sweep(settings: Path) -> None:
    read = read_handover(settings)
    connection = redis.Redis.from_url(str(read.redis_url))
    queue = queue_for(read.engine_name, connection)
    for task in TASKS:
        enqueue(queue, task, settings_file=settings, tick_ms=SystemClock().wall_ms(), awake_ms=0)
    work_off(queue)
    connection.close()


def record_of(settings: Path, kind: RecordKind, record_id: str) -> dict[str, str] | None:
    read = read_handover(settings)

    async def get() -> dict[str, str] | None:
        async with RedisIntake(str(read.redis_url), engine=read.engine_name) as intake:
            return await intake.record(kind, record_id)

    return asyncio.run(get())


def datum(start: int) -> types.Datum:
    tokens = list(range(start, start + 20))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]}
    )


def outputs(client: tinker.TrainingClient) -> list[list[float]]:
    """The log-probabilities of fixed data, bit for bit."""
    result = client.forward([datum(50), datum(90)], "cross_entropy").result()
    return [list(output["logprobs"].data) for output in result.loss_fn_outputs]


def train(client: tinker.TrainingClient, *, steps: int) -> list[tuple[list[list[float]], dict[str, float]]]:
    """What each of so many steps answers."""
    answers = []
    for step in range(steps):
        result = client.forward_backward([datum(60 + 7 * step), datum(300)], "cross_entropy").result()
        norms = client.optim_step(ADAM).result().metrics or {}
        answers.append(([list(output["logprobs"].data) for output in result.loss_fn_outputs], norms))
    return answers


def say(sampler: tinker.SamplingClient) -> tuple[list[int], list[float]]:
    (sequence,) = sampler.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences
    return list(sequence.tokens), list(sequence.logprobs or [])


def test_models_made_from_a_state_repeat_outputs_and_the_next_steps_bit_for_bit(settings, monkeypatch):
    with serving(settings, monkeypatch) as sdk:
        client = sdk.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1)
        train(client, steps=3)
        path = client.save_state("ck").result().path
        saved = outputs(client)
        restored = sdk.create_training_client_from_state_with_optimizer(path)
        fresh, again = (sdk.create_training_client_from_state(path) for _ in range(2))
        assert outputs(restored) == outputs(fresh) == outputs(again) == saved
        expected = train(client, steps=3)
        assert train(restored, steps=3) == expected
        assert outputs(restored) == outputs(client)
        without = train(fresh, steps=3)
        assert train(again, steps=3) == without
        assert without[0][0] == expected[0][0]
        assert without[1:] != expected[1:]


def test_a_copy_outlives_its_source_and_can_be_trained_on(settings, monkeypatch):
    with serving(settings, monkeypatch) as sdk:
        client = sdk.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1)
        train(client, steps=2)
        rest = sdk.create_rest_client()
        path = client.save_state("ck").result().path
        copied = rest.copy_weights(path, destination_project_id="archive").result()
        frozen = rest.copy_weights(client.save_weights_for_sampler("fr").result().path, "archive").result()
        saved = outputs(client)
        rest.delete_checkpoint_from_tinker_path(path).result()
        restored = sdk.create_training_client_from_state_with_optimizer(copied)
        assert outputs(restored) == saved
        assert train(restored, steps=2) == train(client, steps=2)
        assert say(sdk.create_sampling_client(model_path=frozen))
        run = rest.get_training_run_by_tinker_path(copied).result()
        assert run.last_checkpoint is not None
        assert run.last_checkpoint.tinker_path == copied


def test_old_sampler_weights_outlive_the_gang_and_leave_training_alone(settings, monkeypatch):
    with serving(settings, monkeypatch) as sdk:
        client = sdk.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1)
        model = client.model_id
        train(client, steps=2)
        path = client.save_weights_for_sampler("old").result().path
        before = say(sdk.create_sampling_client(model_path=path))
        twin = sdk.create_training_client_from_state_with_optimizer(client.save_state("ck").result().path)
        expected = train(twin, steps=2)
        found = []
        for step in range(2):
            gradient = client.forward_backward([datum(60 + 7 * step), datum(300)], "cross_entropy")
            assert say(sdk.create_sampling_client(model_path=path)) == before
            norms = client.optim_step(ADAM).result().metrics or {}
            found.append(([list(output["logprobs"].data) for output in gradient.result().loss_fn_outputs], norms))
        assert found == expected
        assert say(client.save_weights_and_get_sampling_client()) != before
    sweep(settings)
    assert record_of(settings, RecordKind.CHECKPOINT, path) is not None
    with serving(settings, monkeypatch, epoch=2) as sdk:
        assert say(sdk.create_sampling_client(model_path=path)) == before
        assert (record_of(settings, RecordKind.MODEL, model) or {})["state"] == "ready"


@pytest.mark.config_field("storage_limit", "output_dir")
def test_a_save_over_the_storage_limit_fails_with_numbers_and_training_goes_on(
    tmp_path, redis_url, engine_name, monkeypatch
):
    settings = settings_file(tmp_path, redis_url=redis_url, engine=engine_name, storage_limit="1KB")
    with serving(settings, monkeypatch) as sdk:
        client = sdk.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1)
        for save in (client.save_state, client.save_weights_for_sampler):
            with pytest.raises(tinker.RequestFailedError, match=r"bytes, .* of storage_limit 1024 are used"):
                save("a").result()
        assert not list(output_dir(settings).glob("checkpoints/[!.]*/*"))
        train(client, steps=1)
