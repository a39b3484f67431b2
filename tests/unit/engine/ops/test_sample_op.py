import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, Driver, cross_entropy, open_engine, random_data, randomize

from gradstream.engine.sampler.store import SamplerStore
from gradstream.shared.ids import SamplerId, TenantId
from gradstream.shared.targets import PromptTargets
from gradstream.shared.wire import Failed, Sample, SampleDone, SamplingParams, SaveForSampler, SaveWeights, UnloadModel

PROMPT = np.arange(40, 60, dtype="<i4")
SAMPLER = "s:sample:0"
EPHEMERAL = "tinker://samplers/s:sample:0"
MODEL = "s:train:0"


@pytest.fixture
def driver(tmp_path):
    return Driver(open_engine(output_dir=tmp_path))


def sample(path=None, *, prompt=PROMPT, num_samples=1, **params):
    options = {name: params.pop(name) for name in list(params) if name in Sample.__struct_fields__}
    fields = {"max_tokens": 8, "seed": 3, "stop_token_ids": [], **params}
    return Sample(
        path=path, prompt=prompt.tobytes(), params=SamplingParams(**fields), num_samples=num_samples, **options
    )


def tokens(outcome):
    assert isinstance(outcome, SampleDone), outcome
    return [np.frombuffer(sequence.tokens, "<i4").tolist() for sequence in outcome.sequences]


def logprobs(outcome):
    return [np.frombuffer(sequence.logprobs, "<f4") for sequence in outcome.sequences]


def trained(driver, model=MODEL):
    driver.create(model)
    randomize(driver, model)
    return model


def train_on(driver, model):
    driver.done(model, cross_entropy(random_data([30, 30])))
    driver.step(model, learning_rate=0.1)


def test_the_base_model_answers_with_tokens_and_one_logprob_each(driver):
    outcome = driver.done(SAMPLER, sample(num_samples=3))
    assert [len(one) for one in tokens(outcome)] == [8, 8, 8]
    assert [len(one) for one in logprobs(outcome)] == [8, 8, 8]
    assert [sequence.stop_reason for sequence in outcome.sequences] == ["length"] * 3
    assert outcome.prompt_logprobs is None
    assert outcome.topk_prompt is None


def test_a_seed_repeats_in_any_job_and_no_seed_repeats_in_a_replay_of_the_same_job(driver):
    first, second = (driver.done(SAMPLER, sample()) for _ in range(2))
    assert tokens(first) == tokens(second)
    free, other = (driver.done(SAMPLER, sample(seed=None)) for _ in range(2))
    assert tokens(free) != tokens(other)
    again = Driver(driver.engine)
    for _ in range(2):
        again.done(SAMPLER, sample())
    assert tokens(again.done(SAMPLER, sample(seed=None))) == tokens(free)


def test_trained_weights_are_sampled_and_earlier_snapshots_stay_as_they_were(driver):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    before = driver.done(SAMPLER, sample(EPHEMERAL))
    assert tokens(before) != tokens(driver.done(SAMPLER, sample()))
    train_on(driver, model)
    named = driver.done(model, SaveForSampler(name="later")).path
    assert tokens(driver.done(SAMPLER, sample(EPHEMERAL))) == tokens(before)
    assert tokens(driver.done("x:sample:1", sample(named))) != tokens(before)


def test_snapshots_outlive_the_model_and_the_process(driver, tmp_path):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    before = driver.done(SAMPLER, sample(EPHEMERAL))
    driver.done(model, UnloadModel())
    assert driver.done(SAMPLER, sample(EPHEMERAL)) == before
    reopened = Driver(open_engine(output_dir=tmp_path))
    assert reopened.done(SAMPLER, sample(EPHEMERAL)) == before


def test_snapshots_that_did_not_fit_in_memory_are_read_again(driver):
    driver.engine.state.samplers = SamplerStore(max_bytes=1)
    model = trained(driver)
    paths, expected = [], []
    for number in range(3):
        paths.append(driver.done(model, SaveForSampler(name=f"n{number}")).path)
        expected.append(tokens(driver.done(SAMPLER, sample(paths[-1]))))
        train_on(driver, model)
    assert [tokens(driver.done(SAMPLER, sample(path))) for path in paths] == expected


def test_an_overwritten_checkpoint_is_not_sampled_from_memory(driver):
    model = trained(driver)
    path = driver.done(model, SaveWeights(name="ck")).path
    before = tokens(driver.done(SAMPLER, sample(path)))
    train_on(driver, model)
    driver.done(model, SaveWeights(name="ck", overwrite=True))
    assert tokens(driver.done(SAMPLER, sample(path))) != before


def test_sampling_leaves_training_untouched(driver):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    driver.done(model, cross_entropy(random_data([12])))
    adapter = driver.engine.state.models[model]
    before = [tensor.clone() for tensor in (adapter.weights, adapter.grad, adapter.exp_avg, adapter.exp_avg_sq)]
    random_state = torch.get_rng_state()
    driver.done(SAMPLER, sample(EPHEMERAL, num_samples=4))
    after = (adapter.weights, adapter.grad, adapter.exp_avg, adapter.exp_avg_sq)
    assert all(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_batch_of_samplers_answers_each_as_if_it_were_alone(driver):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    work = [
        ("a:sample:0", sample(num_samples=2)),
        (SAMPLER, sample(EPHEMERAL, seed=9, temperature=0.7, top_k=20)),
        ("a:sample:0", sample("tinker://s:train:0/weights/none")),
        (SAMPLER, sample(EPHEMERAL, prompt=PROMPT[:3], temperature=0.0, max_tokens=20)),
    ]
    together = driver.run(*work)
    assert isinstance(together[2], Failed)
    for index in (0, 1, 3):
        assert tokens(driver.done(*work[index])) == tokens(together[index])


def test_prompt_logprobs_and_tables_have_the_shapes_that_clients_read(driver):
    outcome = driver.done(
        SAMPLER, sample(prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3, max_tokens=5)
    )
    scored = np.frombuffer(outcome.prompt_logprobs, "<f4")
    assert len(scored) == len(PROMPT)
    assert np.isnan(scored[0])
    assert np.isfinite(scored[1:]).all()
    assert (outcome.topk_prompt.k, outcome.topk_prompt.length) == (2, len(PROMPT))
    assert np.frombuffer(outcome.topk_prompt.logprobs, "<f4")[:2].tolist() == [-99999.0, -99999.0]
    topk = outcome.sequences[0].topk
    assert (topk.k, topk.length) == (3, 5)
    ids = np.frombuffer(topk.token_ids, "<i4").reshape(5, 3)
    assert (np.frombuffer(topk.logprobs, "<f4").reshape(5, 3)[:, 0] >= logprobs(outcome)[0] - 1e-6).all()
    assert ids.max() < 2048


def test_a_prompt_of_one_token_has_no_position_to_ask_about(driver):
    targets = PromptTargets(shape=(0, 5), token_ids=b"")
    asked = {"prompt_logprobs": True, "topk_prompt_logprobs": 2, "prompt_alt_tokens_k": 3}
    outcome = driver.done(SAMPLER, sample(prompt=PROMPT[:1], target_prompt_logprobs=targets, **asked))
    assert np.isnan(np.frombuffer(outcome.prompt_logprobs, "<f4")).tolist() == [True]
    assert (outcome.topk_prompt.length, outcome.alt_tokens.length, outcome.target_prompt.logprobs) == (1, 0, b"")


def test_targets_and_alternatives_are_answered_beside_the_sample_and_repeat_with_the_seed(driver):
    rows = len(PROMPT) - 1
    ids = np.stack([PROMPT[1:], np.full(rows, -1)], axis=1).astype("<i4")
    targets = PromptTargets(shape=(rows, 2), token_ids=ids.tobytes())
    asked = sample(prompt_logprobs=True, target_prompt_logprobs=targets, prompt_alt_tokens_k=4, temperature=0.9)
    first, second = driver.done(SAMPLER, asked), driver.done("x:sample:1", asked)
    scored = np.frombuffer(first.target_prompt.logprobs, "<f4").reshape(rows, 2)
    np.testing.assert_allclose(scored[:, 0], np.frombuffer(first.prompt_logprobs, "<f4")[1:], atol=1e-5)
    assert not scored[:, 1].any()
    assert first.alt_tokens == second.alt_tokens
    assert (first.alt_tokens.k, first.alt_tokens.length) == (4, rows)
    assert tokens(first) == tokens(driver.done(SAMPLER, sample(temperature=0.9)))


def test_eos_ends_a_sequence_unless_an_empty_stop_list_was_given(driver):
    (free,) = tokens(driver.done(SAMPLER, sample(temperature=0.0, max_tokens=300, stop_token_ids=[])))
    stopped = driver.done(SAMPLER, sample(temperature=0.0, max_tokens=300, stop_token_ids=None))
    eos = 2
    wanted = free[: free.index(eos) + 1] if eos in free else free
    assert tokens(stopped) == [wanted]


def test_a_stop_text_is_found_with_the_models_own_tokenizer(driver):
    (free,) = tokens(driver.done(SAMPLER, sample(temperature=0.0, max_tokens=60)))
    outcome = driver.done(SAMPLER, sample(temperature=0.0, max_tokens=60, stop_token_ids=None, stop_texts=["e"]))
    (stopped,) = tokens(outcome)
    assert outcome.sequences[0].stop_reason == "stop"
    assert 0 < len(stopped) < len(free)
    assert stopped == free[: len(stopped)]


def test_the_context_bounds_the_new_tokens(driver):
    driver.engine.state.config = replace(driver.engine.state.config, max_context_tokens=24)
    outcome = driver.done(SAMPLER, sample(max_tokens=100))
    assert [len(one) for one in tokens(outcome)] == [5]
    assert outcome.sequences[0].stop_reason == "length"
    (full,) = driver.run((SAMPLER, sample(prompt=np.arange(24, dtype="<i4"), max_tokens=1, prompt_logprobs=True)))
    assert isinstance(full, SampleDone)


BAD = {
    "empty prompt": (sample(prompt=PROMPT[:0]), "prompt: 0 tokens"),
    "long prompt": (sample(prompt=np.zeros(5000, "<i4")), "it must have 1 to 1024"),
    "unknown token": (sample(prompt=np.array([1, 2048], "<i4")), "token 2048 is outside"),
    "negative token": (sample(prompt=np.array([1, -1], "<i4")), "token -1 is outside"),
    "odd bytes": (msgspec.structs.replace(sample(), prompt=b"abc"), "prompt: 3 bytes"),
    "no tokens": (sample(max_tokens=0), "max_tokens: 0"),
    "no samples": (sample(num_samples=0), "num_samples: 0"),
    "negative temperature": (sample(temperature=-0.1), "temperature: -0.1"),
    "infinite temperature": (sample(temperature=float("inf")), "temperature: inf"),
    "top_p zero": (sample(top_p=0.0), "top_p: 0.0"),
    "top_p above one": (sample(top_p=1.5), "top_p: 1.5"),
    "top_p nan": (sample(top_p=float("nan")), "top_p: nan"),
    "top_k": (sample(top_k=-5), "top_k: -5"),
    "empty stop text": (sample(stop_texts=["a", ""]), "a stop text is empty"),
    "last n without logprobs": (sample(prompt_logprobs_last_n=1), "prompt_logprobs_last_n: it is about"),
    "last n of all": (sample(prompt_logprobs=True, prompt_logprobs_last_n=20), "prompt_logprobs_last_n: 20"),
    "targets of another length": (
        sample(target_prompt_logprobs=PromptTargets(shape=(1, 1), token_ids=bytes(4))),
        "target_prompt_logprobs: shape [1, 1]",
    ),
    "too many alternatives": (sample(prompt_alt_tokens_k=100_000), "prompt_alt_tokens_k: 100000"),
    "too many candidates": (sample(topk_sample_logprobs=100_000), "topk_sample_logprobs: 100000"),
    "no such path": (sample("file:///etc/passwd"), "is not a checkpoint"),
    "unknown checkpoint": (sample("tinker://m/sampler_weights/x"), "there is no checkpoint"),
}


@pytest.fixture(scope="module")
def shared_driver(tmp_path_factory):
    return Driver(open_engine(output_dir=tmp_path_factory.mktemp("out")))


@pytest.mark.parametrize(("payload", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_fails_alone_with_its_field_named(shared_driver, payload, message):
    bad, good = shared_driver.run((SAMPLER, payload), (SAMPLER, sample()))
    assert isinstance(bad, Failed)
    assert bad.category == "user"
    assert message in bad.message
    assert isinstance(good, SampleDone)


def test_another_tenants_sampler_does_not_exist_whether_in_memory_or_on_disk(driver):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    for _ in range(2):
        (outcome,) = driver.run((SAMPLER, sample(EPHEMERAL)), tenant=TenantId("other"))
        assert outcome.code == "unknown_model"
        driver.engine.state.samplers = SamplerStore()


def test_stop_texts_without_a_tokenizer_are_refused(tmp_path):
    bare = tmp_path / "model"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).symlink_to(Path(DENSE, name).resolve())
    driver = Driver(open_engine(bare, output_dir=tmp_path / "out"))
    (outcome,) = driver.run((SAMPLER, sample(stop_texts=["x"])))
    assert outcome.code == "unsupported"


def test_sampling_a_snapshot_marks_it_as_used(driver, tmp_path):
    model = trained(driver)
    driver.done(model, SaveForSampler(sampler_id=SamplerId(SAMPLER)))
    directory = tmp_path / "samplers" / "s+sample+0"
    os.utime(directory, (10, 10))
    driver.done(SAMPLER, sample())
    assert directory.stat().st_mtime == 10
    driver.done(SAMPLER, sample(EPHEMERAL))
    assert directory.stat().st_mtime > 10
