"""The unmodified tinker SDK works against the API: training, sampling, checkpoints, errors, sessions."""

import logging
import math
from collections.abc import Iterator

import numpy as np
import pytest
import tinker
import torch
from tests.support.cards import CONTEXT_TOKENS, MODEL_NAME, VOCAB_SIZE
from tests.support.rig import FAST, LIMITS, Rig, running_rig
from tinker import types

LOGPROB = np.float32(-math.log(VOCAB_SIZE))


@pytest.fixture
def sdk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    """A client of the rig."""
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    client = tinker.ServiceClient(base_url=rig.base_url, user_metadata={"who": "contract"})
    yield client
    client.holder.close()


def datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": tokens, "weights": [0.5] * len(tokens)},
    )


def test_training_runs_and_every_number_comes_back(sdk: tinker.ServiceClient) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8, seed=7)
    data = [datum([1, 2, 3]), datum([4]), datum([5, 6])]
    pending = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=1.0))
    result = pending.result()
    assert result.metrics["loss:sum"] == pytest.approx(0.5 * 6 * math.log(VOCAB_SIZE), rel=1e-6)
    assert [out["logprobs"].data for out in result.loss_fn_outputs] == [[LOGPROB] * 3, [LOGPROB], [LOGPROB] * 2]
    assert step.result().metrics == {"grad_norm": 0.0}
    assert client.forward(data, "cross_entropy").result().metrics == result.metrics


def test_get_info_names_model_rank_and_tokenizer(sdk: tinker.ServiceClient) -> None:
    info = sdk.create_lora_training_client(base_model="uniform-alias", rank=4).get_info()
    assert (info.model_data.model_name, info.model_data.tokenizer_id) == ("uniform-alias", "models/uniform")
    assert (info.is_lora, info.lora_rank) == (True, 4)


def test_a_call_in_many_chunks_is_put_together_in_order(sdk: tinker.ServiceClient, rig: Rig) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    lengths = [1 + index % 5 for index in range(700)]
    result = client.forward_backward([datum(list(range(n))) for n in lengths], "cross_entropy").result()
    assert [len(out["logprobs"].data) for out in result.loss_fn_outputs] == lengths
    assert FAST.max_datums == 256
    assert [seq for owner, seq, _ in rig.worker.seen if owner == client.model_id] == [0, 1, 2, 3]


def test_a_custom_loss_trains_through_forward_and_backward(sdk: tinker.ServiceClient) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)

    def loss(_data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -sum(x.sum() for x in logprobs), {"mine": 1.0}

    result = client.forward_backward_custom([datum([1, 2, 3])], loss).result()
    assert result.metrics["loss:sum"] == pytest.approx(3 * math.log(VOCAB_SIZE), rel=1e-6)


def test_a_checkpoint_is_saved_and_a_new_client_continues_from_it(sdk: tinker.ServiceClient) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    path = client.save_state("ck1", ttl_seconds=3600).result().path
    assert path == f"tinker://{client.model_id}/weights/ck1"
    for other in (
        sdk.create_training_client_from_state(path),
        sdk.create_training_client_from_state_with_optimizer(path),
    ):
        assert other.model_id != client.model_id
        assert other.get_info().lora_rank == 8
        assert other.optim_step(types.AdamParams()).result().metrics == {"grad_norm": 0.0}
    client.load_state(path).result()


def test_sampling_from_base_checkpoint_and_fresh_weights(sdk: tinker.ServiceClient) -> None:
    training = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    named = training.save_weights_for_sampler("s1").result().path
    samplers = [
        sdk.create_sampling_client(base_model=MODEL_NAME),
        sdk.create_sampling_client(model_path=named),
        training.save_weights_and_get_sampling_client(),
    ]
    prompt = types.ModelInput.from_ints([1, 2, 3])
    params = types.SamplingParams(max_tokens=5, seed=1, temperature=0.7, stop=["\n"], top_k=50, top_p=0.9)
    for sampler in samplers:
        response = sampler.sample(
            prompt, num_samples=2, sampling_params=params, include_prompt_logprobs=True, topk_prompt_logprobs=2
        ).result()
        assert [len(sequence.tokens) for sequence in response.sequences] == [5, 5]
        assert list(response.sequences[0].logprobs or []) == [LOGPROB] * 5
        assert response.prompt_logprobs == [None, LOGPROB, LOGPROB]
        assert response.topk_prompt_logprobs is not None
        assert sampler.compute_logprobs(prompt).result() == [None, LOGPROB, LOGPROB]


def test_many_samples_at_once_all_come_back(sdk: tinker.ServiceClient) -> None:
    sampler = sdk.create_sampling_client(base_model=MODEL_NAME)
    params = types.SamplingParams(max_tokens=2)
    pending = [
        sampler.sample(types.ModelInput.from_ints([index]), num_samples=1, sampling_params=params)
        for index in range(200)
    ]
    assert all(len(future.result().sequences[0].tokens) == 2 for future in pending)


def test_a_result_above_the_inline_size_is_fetched_in_two_steps(sdk: tinker.ServiceClient) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    data = [datum([1] * 100) for _ in range(60)]
    result = client.forward_backward(data, "cross_entropy").result()
    assert FAST.inline_result_bytes < 60 * 100 * 4
    assert len(result.loss_fn_outputs) == 60


def test_bad_input_raises_at_once_and_the_client_can_go_on(sdk: tinker.ServiceClient) -> None:
    client = sdk.create_lora_training_client(base_model=MODEL_NAME, rank=8)
    with pytest.raises(tinker.BadRequestError, match="outside the vocabulary"):
        client.forward_backward([datum([VOCAB_SIZE])], "cross_entropy").result()
    with pytest.raises(tinker.BadRequestError, match="'dro' is not offered here"):
        client.forward_backward([datum([1])], "dro").result()
    with pytest.raises(tinker.RequestFailedError, match="the gradient is not finite") as failure:
        client.optim_step(types.AdamParams(learning_rate=666.0)).result()
    assert failure.value.category == tinker.types.RequestErrorCategory.User
    assert client.optim_step(types.AdamParams()).result().metrics == {"grad_norm": 0.0}


def test_capabilities_list_every_name(sdk: tinker.ServiceClient) -> None:
    models = sdk.get_server_capabilities().supported_models
    assert [(model.model_name, model.max_context_length) for model in models] == [
        (MODEL_NAME, CONTEXT_TOKENS),
        ("uniform-alias", CONTEXT_TOKENS),
    ]


def test_the_client_rides_out_a_full_queue(
    redis_url: str, engine_name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-test")
    caplog.set_level(logging.WARNING)
    with running_rig(redis_url, engine=engine_name, limits=LIMITS) as rig:
        service = tinker.ServiceClient(base_url=rig.base_url)
        client = service.create_lora_training_client(base_model=MODEL_NAME, rank=8)
        pending = [client.optim_step(types.AdamParams()) for _ in range(4 * LIMITS.max_queued_jobs_per_model)]
        assert all(future.result().metrics == {"grad_norm": 0.0} for future in pending)
        service.holder.close()
