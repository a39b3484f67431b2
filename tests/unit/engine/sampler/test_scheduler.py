from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gradstream.engine.adapters.adapter import Owner, new_adapter
from gradstream.engine.head import target_logprobs
from gradstream.engine.models.build import load_base
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.request import PromptQuestions, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine, SamplerLimits
from gradstream.engine.sampler.stops import StopRule
from gradstream.shared.errors import NonFinite
from gradstream.shared.ids import ModelId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec

DENSE = Path("tests/models/tiny-qwen3-shakespeare")
MOE = Path("tests/models/tiny-qwen3-moe-shakespeare")
GREEDY = Choice(temperature=0.0, top_k=-1, top_p=1.0)
WARM = Choice(temperature=0.8, top_k=-1, top_p=0.95)
NEVER = StopRule(token_ids=frozenset())
PROMPTS = [np.random.default_rng(length).integers(4, 2000, length).astype(np.int32) for length in (7, 1, 30, 12)]


@pytest.fixture(scope="module", params=[DENSE, MOE], ids=["dense", "moe"])
def model_dir(request):
    return request.param


@pytest.fixture(scope="module")
def base(model_dir):
    return load_base(model_dir, device=torch.device("cpu"), dtype=torch.float32)


def adapter(base, *, rank=4, seed=1, value=None):
    """An adapter that changes the model noticeably; value fills it instead."""
    owner = Owner(
        model_id=ModelId("s:train:0"),
        tenant=TenantId("local"),
        session_id=SessionId("s"),
        spec=LoraSpec(rank=rank, seed=seed),
    )
    made = new_adapter(owner, base_sites=base.sites, lora_alpha=32.0, engine_seed=0, device=torch.device("cpu"))
    if value is None:
        made.weights.add_(torch.randn(made.weights.shape, generator=torch.Generator().manual_seed(seed)) * 0.03)
    else:
        made.weights.fill_(value)
    return made.frozen_copy()


def request(prompt, *, choice=WARM, num_samples=1, max_tokens=12, seed=5, **options):
    keys = tuple(key_of(seed=seed, job="", sample_index=index) for index in range(num_samples))
    options = {"adapter": None, "stop": NEVER, "name": str(seed), **options}
    return SampleRequest(prompt=prompt, choice=choice, max_tokens=max_tokens, keys=keys, **options)


def run(base, requests, **limits):
    """The answers, in the order of the requests."""
    engine = SamplerEngine(base=base, limits=SamplerLimits(**limits))
    for one in requests:
        engine.add(one)
    answers = {}
    while engine.has_work():
        for answer in engine.step():
            assert id(answer.request) not in answers
            answers[id(answer.request)] = answer
    return [answers[id(one)] for one in requests]


def forward_logprobs(base, prompt, tokens, weights):
    """What the trainer's forward pass says about tokens behind prompt."""
    ids = torch.tensor([*prompt.tolist(), *tokens])
    pass_ = base.adapter_pass([(0, len(ids), weights)])
    hidden = base.hidden(ids, torch.arange(len(ids)), attention=base.packed([len(ids)]), adapters=pass_)
    pass_ = base.adapter_pass([(0, len(ids) - 1, weights)])
    return target_logprobs(base, hidden[:-1], ids[1:], pass_)[len(prompt) - 1 :].numpy()


@torch.no_grad()
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base model", "adapter"])
def test_sampled_logprobs_are_those_of_the_trainers_forward_pass(base, with_adapter):
    weights = adapter(base) if with_adapter else None
    plain = Choice(temperature=1.0, top_k=-1, top_p=1.0)
    answers = run(base, [request(prompt, choice=plain, num_samples=2, adapter=weights) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        for sampled in answer.sequences:
            expected = forward_logprobs(base, prompt, sampled.tokens, weights)
            np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-5, rtol=0)


def test_greedy_tokens_are_those_of_transformers_generate(base, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    answers = run(base, [request(prompt, choice=GREEDY, max_tokens=24) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.from_numpy(prompt.astype("int64"))[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        assert answer.sequences[0].tokens == expected[0, len(prompt) :].tolist()


def mixed_requests(base):
    """Requests with different adapters, ranks, lengths, counts and choices."""
    return [
        request(PROMPTS[0], num_samples=3, max_tokens=9, seed=1),
        request(PROMPTS[1], adapter=adapter(base, rank=2, seed=2), max_tokens=1, seed=2, topk_sample=3),
        request(PROMPTS[2], adapter=adapter(base, rank=8, seed=3), num_samples=2, max_tokens=20, seed=3),
        request(PROMPTS[3], choice=GREEDY, max_tokens=4, seed=4, questions=PromptQuestions(logprobs=True, topk=2)),
        request(PROMPTS[0], adapter=adapter(base, rank=8, seed=3), num_samples=2, max_tokens=15, seed=6),
    ]


@pytest.mark.parametrize(
    "limits",
    [{}, {"max_rows": 3}, {"max_rows": 1}, {"max_cache_tokens": 80}, {"max_prompt_tokens": 10}],
    ids=["all at once", "three rows", "one row", "a small cache", "short prompt passes"],
)
def test_a_request_gets_the_same_tokens_alone_as_among_others(base, limits):
    requests = mixed_requests(base)
    together = run(base, requests, **limits)
    for one, answer in zip(requests, together, strict=True):
        (alone,) = run(base, [one])
        for left, right in zip(answer.sequences, alone.sequences, strict=True):
            assert left.tokens == right.tokens
            np.testing.assert_allclose(left.logprobs, right.logprobs, atol=1e-5, rtol=0)
            assert left.stop_reason == right.stop_reason


def test_requests_that_come_between_steps_are_answered_like_the_others(base):
    requests = mixed_requests(base)
    expected = run(base, requests)
    engine = SamplerEngine(base=base, limits=SamplerLimits(max_rows=4))
    answers, waiting = {}, list(requests)
    while waiting or engine.has_work():
        if waiting:
            engine.add(waiting.pop(0))
        for answer in engine.step():
            answers[id(answer.request)] = answer
    for one, wanted in zip(requests, expected, strict=True):
        assert [s.tokens for s in answers[id(one)].sequences] == [s.tokens for s in wanted.sequences]


def test_samples_of_one_seed_differ_and_repeat(base):
    first, second = run(base, [request(PROMPTS[0], num_samples=4), request(PROMPTS[0], num_samples=6)])
    tokens = [sampled.tokens for sampled in second.sequences]
    assert len({tuple(one) for one in tokens}) == 6
    assert [sampled.tokens for sampled in first.sequences] == tokens[:4]


def test_a_stop_token_is_the_last_one_and_its_logprob_is_there(base):
    (free,) = run(base, [request(PROMPTS[0], max_tokens=20)])
    tokens = free.sequences[0].tokens
    stop = StopRule(token_ids=frozenset({tokens[5]}))
    (stopped,) = run(base, [request(PROMPTS[0], max_tokens=20, stop=stop)])
    end = tokens.index(tokens[5]) + 1
    assert stopped.sequences[0].tokens == tokens[:end]
    assert len(stopped.sequences[0].logprobs) == end
    assert stopped.sequences[0].stop_reason == "stop"
    assert free.sequences[0].stop_reason == "length"
    assert len(tokens) == 20


def test_a_stop_token_at_the_last_allowed_place_is_a_stop(base):
    (free,) = run(base, [request(PROMPTS[2], max_tokens=1)])
    stop = StopRule(token_ids=frozenset(free.sequences[0].tokens))
    (stopped,) = run(base, [request(PROMPTS[2], max_tokens=1, stop=stop)])
    assert stopped.sequences[0].stop_reason == "stop"


@torch.no_grad()
def test_prompt_logprobs_are_the_trainers_bits_at_temperature_one(base):
    weights = adapter(base)
    hot = Choice(temperature=3.0, top_k=2, top_p=0.5)
    (answer,) = run(
        base, [request(PROMPTS[2], choice=hot, adapter=weights, max_tokens=1, questions=PromptQuestions(logprobs=True))]
    )
    assert np.isnan(answer.scores.logprobs[0])
    expected = forward_logprobs(base, PROMPTS[2][:1], PROMPTS[2][1:].tolist(), weights)
    np.testing.assert_array_equal(answer.scores.logprobs[1:], expected)


@torch.no_grad()
def test_topk_tables_hold_the_likeliest_tokens_of_each_position(base, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    cold = Choice(temperature=0.5, top_k=-1, top_p=1.0)
    (answer,) = run(
        base, [request(PROMPTS[3], choice=cold, questions=PromptQuestions(topk=3), topk_sample=2, max_tokens=5)]
    )
    sampled = answer.sequences[0]
    ids = torch.tensor([[*PROMPTS[3].tolist(), *sampled.tokens]])
    logits = model(ids).logits[0]
    values, tokens = logits[: len(PROMPTS[3]) - 1].log_softmax(-1).topk(3)
    assert answer.scores.topk.token_ids[0].tolist() == [0, 0, 0]
    assert answer.scores.topk.logprobs[0].tolist() == [-99999.0] * 3
    np.testing.assert_array_equal(answer.scores.topk.token_ids[1:], tokens)
    np.testing.assert_allclose(answer.scores.topk.logprobs[1:], values, atol=1e-5)
    values, tokens = (logits[len(PROMPTS[3]) - 1 : -1] / 0.5).log_softmax(-1).topk(2)
    np.testing.assert_array_equal(sampled.topk.token_ids, tokens)
    np.testing.assert_allclose(sampled.topk.logprobs, values, atol=1e-5)


def test_an_adapter_that_is_not_finite_fails_its_own_request_only(base):
    broken = request(PROMPTS[0], adapter=adapter(base, value=float("nan")), num_samples=2, seed=9)
    healthy = mixed_requests(base)
    expected = run(base, healthy)
    answers = run(base, [healthy[0], broken, *healthy[1:]])
    assert isinstance(answers[1].error, NonFinite)
    del answers[1]
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.error is None
        assert [s.tokens for s in answer.sequences] == [s.tokens for s in wanted.sequences]


def test_a_row_that_a_broken_request_used_is_clean_for_the_next_one(base):
    engine = SamplerEngine(base=base)
    long_prompt = np.concatenate([PROMPTS[2], PROMPTS[2]])
    companion = request(long_prompt, max_tokens=30, seed=1)
    engine.add(companion)
    engine.add(request(long_prompt, adapter=adapter(base, value=float("nan")), max_tokens=30, seed=2))
    engine.step()
    late = request(PROMPTS[0], max_tokens=10, seed=3)
    engine.add(late)
    answers = []
    while engine.has_work():
        answers += engine.step()
    (alone,) = run(base, [late])
    (found,) = [answer for answer in answers if answer.request is late]
    assert found.sequences[0].tokens == alone.sequences[0].tokens


def test_the_cache_is_given_back_when_nothing_is_left(base):
    engine = SamplerEngine(base=base)
    engine.add(request(PROMPTS[0], num_samples=3))
    while engine.has_work():
        engine.step()
    assert engine.cache._layers == {}


def test_a_cache_that_is_never_empty_stays_within_its_bound(base):
    limits = SamplerLimits(max_rows=8, max_cache_tokens=8 * 128)
    engine = SamplerEngine(base=base, limits=limits)
    requests = [request(PROMPTS[1], max_tokens=300, seed=1)]
    requests += [request(PROMPTS[0], num_samples=8, max_tokens=20 + 40 * turn, seed=turn) for turn in range(3)]
    expected = [run(base, [one])[0] for one in requests]
    answers = {}
    for one in [*requests[1:], requests[0], *requests[1:3]]:
        engine.add(one)
    sizes = []
    while engine.has_work():
        for answer in engine.step():
            answers[id(answer.request)] = answer
        sizes.append(engine.cache._num_rows * engine.cache._capacity)
    assert max(sizes) <= limits.max_cache_tokens
    for one, wanted in zip(requests, expected, strict=True):
        assert [s.tokens for s in answers[id(one)].sequences] == [s.tokens for s in wanted.sequences]


def test_a_prompt_that_several_requests_have_is_computed_once(base, monkeypatch):
    lengths = []
    real = base.hidden

    def counted(tokens_T, *args, **options):
        lengths.append(len(tokens_T))
        return real(tokens_T, *args, **options)

    monkeypatch.setattr(base, "hidden", counted)
    weights = adapter(base)
    requests = [request(PROMPTS[2], num_samples=2, seed=1), request(PROMPTS[2], max_tokens=5, seed=2)]
    requests += [request(PROMPTS[2], adapter=weights, seed=3), request(PROMPTS[3], seed=4)]
    requests += [request(PROMPTS[2], adapter=weights, seed=5, questions=PromptQuestions(logprobs=True))]
    together = run(base, requests)
    assert lengths[0] == 2 * len(PROMPTS[2]) + len(PROMPTS[3])
    monkeypatch.undo()
    for one, answer in zip(requests, together, strict=True):
        (alone,) = run(base, [one])
        assert [s.tokens for s in answer.sequences] == [s.tokens for s in alone.sequences]
