"""The tinker SDK samples a real server with the tiny model."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from examples.local_server import local_server

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.e2e]
TOKENS = [int(token) for token in np.random.default_rng(3).integers(4, 2000, 12)]
PROMPT = types.ModelInput.from_ints(TOKENS)
ONE = types.SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tinker.ServiceClient]:
    with (
        pytest.MonkeyPatch.context() as patch,
        local_server(ROOT / "configs" / "tiny.yaml", output_dir=tmp_path_factory.mktemp("server")) as server,
    ):
        patch.setenv("TINKER_API_KEY", "tml-test")
        client = tinker.ServiceClient(base_url=server.url)
        yield client
        client.holder.close()


@pytest.fixture(scope="module")
def sampler(service: tinker.ServiceClient) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=model_name(service))


def model_name(service: tinker.ServiceClient) -> str:
    return str(service.get_server_capabilities().supported_models[0].model_name)


def numbers(logprobs: list[float | None]) -> list[float]:
    assert all(value is not None for value in logprobs)
    return [float(value) for value in logprobs if value is not None]


def test_compute_logprobs_are_those_of_a_forward_pass_of_an_untrained_model(
    service: tinker.ServiceClient, sampler: tinker.SamplingClient
) -> None:
    scored = sampler.compute_logprobs(PROMPT).result()
    assert scored[0] is None
    training = service.create_lora_training_client(base_model=model_name(service), rank=4)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]}
    )
    (output,) = training.forward([datum], "cross_entropy").result().loss_fn_outputs
    np.testing.assert_allclose(numbers(scored[1:]), output["logprobs"].data, atol=1e-5)


def test_target_prompt_logprobs_come_back_in_the_layout_that_was_sent(sampler: tinker.SamplingClient) -> None:
    scored = numbers(sampler.compute_logprobs(PROMPT).result()[1:])
    cells = [cell for token in TOKENS[1:] for cell in (token, -1)]
    dense = types.TensorData(data=cells, dtype="int64", shape=[len(TOKENS) - 1, 2])
    sparse = types.TensorData(
        data=[TOKENS[5], TOKENS[2]],
        dtype="int64",
        shape=[len(TOKENS) - 1, 7],
        sparse_crow_indices=[0, 0] + [1] * 3 + [2] * (len(TOKENS) - 5),
        sparse_col_indices=[6, 0],
    )
    answer = sampler.sample(PROMPT, 1, ONE, target_prompt_logprobs=dense).result().target_prompt_logprobs
    assert answer is not None
    assert answer.shape == dense.shape
    np.testing.assert_allclose(answer.data[::2], scored, atol=1e-5)
    assert list(answer.data[1::2]) == [0.0] * len(scored)
    answer = sampler.sample(PROMPT, 1, ONE, target_prompt_logprobs=sparse).result().target_prompt_logprobs
    assert answer is not None
    assert (answer.shape, answer.sparse_crow_indices, answer.sparse_col_indices) == (
        sparse.shape,
        sparse.sparse_crow_indices,
        sparse.sparse_col_indices,
    )
    assert all(value < 0 for value in answer.data)


def test_last_n_and_alternatives_pass_the_sdks_own_checks(sampler: tinker.SamplingClient) -> None:
    whole = sampler.compute_logprobs(PROMPT).result()
    response = sampler.sample(
        PROMPT,
        1,
        ONE,
        include_prompt_logprobs=True,
        topk_prompt_logprobs=2,
        prompt_logprobs_last_n=3,
        prompt_alt_tokens_k=4,
    ).result()
    assert response.prompt_logprobs is not None
    assert response.prompt_logprobs[:-3] == [None] * (len(TOKENS) - 3)
    np.testing.assert_allclose(numbers(response.prompt_logprobs[-3:]), numbers(whole[-3:]), atol=1e-5)
    topk = response.topk_prompt_logprobs
    assert topk is not None
    assert [row is None for row in topk] == [True] * (len(TOKENS) - 3) + [False] * 3
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.shape == [len(TOKENS) - 1, 4]
    assert all(value <= 0 for value in response.prompt_alt_tokens.logprobs.data)


def test_sample_logprobs_are_those_of_the_tempered_distribution(sampler: tinker.SamplingClient) -> None:
    hot, cold = (
        types.SamplingParams(max_tokens=1, temperature=temperature, seed=4, top_k=1) for temperature in (1.0, 0.5)
    )
    tables = []
    for params in (hot, cold):
        (sequence,) = sampler.sample(PROMPT, 1, params, topk_sample_logprobs=3).result().sequences
        assert sequence.topk_logprobs is not None
        (row,) = sequence.topk_logprobs
        assert row is not None
        assert sequence.logprobs == pytest.approx([row[0][1]], abs=1e-5)
        tables.append(row)
    assert [token for token, _ in tables[0]] == [token for token, _ in tables[1]]
    gaps = [row[0][1] - row[2][1] for row in tables]
    assert gaps[1] == pytest.approx(2 * gaps[0], rel=1e-3)


def test_a_seeded_request_gives_the_same_alone_and_beside_eight_others(sampler: tinker.SamplingClient) -> None:
    params = types.SamplingParams(max_tokens=24, seed=11, temperature=0.8, top_p=0.95, stop=[])
    alone = sampler.sample(PROMPT, 3, params).result().sequences
    others = [
        sampler.sample(
            types.ModelInput.from_ints(TOKENS[index:]), 2, types.SamplingParams(max_tokens=8 + 4 * index, stop=[])
        )
        for index in range(8)
    ]
    beside = sampler.sample(PROMPT, 3, params).result().sequences
    assert [one.tokens for one in beside] == [one.tokens for one in alone]
    for left, right in zip(beside, alone, strict=True):
        assert left.logprobs is not None
        np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5)
        assert (left.stop_reason, len(left.tokens)) == ("length", 24)
    assert len({tuple(one.tokens) for one in alone}) == 3
    assert all(math.isfinite(sum(one.logprobs or [])) for future in others for one in future.result().sequences)


def test_stability_info_is_refused_with_the_reason(service: tinker.ServiceClient) -> None:
    recording = service.create_sampling_client(base_model=model_name(service), record_stability_info=True)
    with pytest.raises(tinker.BadRequestError, match=r"record_stability_info: .*stable_reinforce"):
        recording.sample(PROMPT, 1, ONE).result()


def test_handles_of_earlier_snapshots_say_the_same_after_more_training(service: tinker.ServiceClient) -> None:
    training = service.create_lora_training_client(base_model=model_name(service), rank=4, seed=1)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS[:-1]), loss_fn_inputs={"target_tokens": TOKENS[1:]}
    )
    handles, said = [], []
    for _ in range(3):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        handles.append(training.save_weights_and_get_sampling_client())
        said.append(numbers(handles[-1].compute_logprobs(PROMPT).result()[1:]))
    sums = [sum(one) for one in said]
    assert sums == sorted(sums)
    assert sums[0] < sums[1] < sums[2]
    running = [
        handle.sample(PROMPT, 2, types.SamplingParams(max_tokens=100, seed=1, stop=[]), include_prompt_logprobs=True)
        for handle in handles
    ]
    training.forward_backward([datum], "cross_entropy").result()
    training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    for before, future in zip(said, running, strict=True):
        logprobs = future.result().prompt_logprobs
        assert logprobs is not None
        np.testing.assert_allclose(numbers(logprobs[1:]), before, atol=1e-5)
