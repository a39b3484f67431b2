from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gradstream.engine.models.build import load_base
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.request import PromptQuestions, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine
from gradstream.engine.sampler.stops import StopRule
from gradstream.shared.targets import Cells

DENSE = Path("tests/models/tiny-qwen3-shakespeare")
PROMPT = np.random.default_rng(0).integers(4, 2000, 40).astype(np.int32)
WARM = Choice(temperature=0.5, top_k=3, top_p=0.5)


@pytest.fixture(scope="module")
def base():
    return load_base(DENSE, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def oracle_logits():
    """What transformers says in double precision behind each prompt token."""
    model = AutoModelForCausalLM.from_pretrained(DENSE).double().eval()
    with torch.no_grad():
        return model(torch.from_numpy(PROMPT.astype("int64"))[None]).logits[0]


def scores(base, questions, *, choice=WARM):
    engine = SamplerEngine(base=base)
    engine.add(
        SampleRequest(
            name="a",
            adapter=None,
            prompt=PROMPT,
            max_tokens=1,
            choice=choice,
            stop=StopRule(token_ids=frozenset()),
            keys=(b"k",),
            questions=questions,
        )
    )
    (finished,) = engine.step()
    return finished.scores


@pytest.fixture(params=[None, 7], ids=["one chunk", "chunks of seven"])
def chunked(request, monkeypatch, base):
    """The positions in one chunk, or in several that divide nothing evenly."""
    if request.param is not None:
        monkeypatch.setattr("gradstream.engine.sampler.prompts.CHUNK_BYTES", 4 * base.vocab_size * request.param)


@pytest.mark.usefixtures("chunked")
def test_targets_are_scored_at_their_positions_and_minus_one_is_zero(base, oracle_logits):
    generator = np.random.default_rng(1)
    rows = np.sort(generator.integers(0, len(PROMPT) - 1, 100))
    token_ids = generator.integers(0, base.vocab_size, 100)
    token_ids[::7] = -1
    found = scores(base, PromptQuestions(targets=Cells(rows=rows, token_ids=token_ids))).targets
    logprobs_TV = torch.log_softmax(oracle_logits, dim=-1).numpy()
    expected = [0.0 if token < 0 else logprobs_TV[row, token] for row, token in zip(rows, token_ids, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("last_n", [1, 10, len(PROMPT) - 1])
@pytest.mark.parametrize("num_drawn", [0, 1])
def test_last_n_blanks_what_comes_before_and_changes_nothing_behind(base, last_n, num_drawn):
    whole = scores(base, PromptQuestions(logprobs=True, topk=3))
    part = scores(base, PromptQuestions(logprobs=True, topk=3, last_n=last_n, num_drawn=num_drawn))
    assert np.isnan(part.logprobs[:-last_n]).all()
    np.testing.assert_allclose(part.logprobs[-last_n:], whole.logprobs[-last_n:], atol=1e-5)
    assert (part.topk.logprobs[:-last_n] == -99999.0).all()
    assert (part.topk.token_ids[:-last_n] == 0).all()
    assert len(part.topk.token_ids) == len(PROMPT)
    np.testing.assert_array_equal(part.topk.token_ids[-last_n:], whole.topk.token_ids[-last_n:])


@pytest.mark.usefixtures("chunked")
def test_alternatives_are_drawn_from_each_positions_tempered_distribution(base, oracle_logits):
    num_drawn = 2000
    found = scores(base, PromptQuestions(num_drawn=num_drawn, key=key_of(seed=1, job="", sample_index=-1))).drawn
    assert found.token_ids.shape == (len(PROMPT) - 1, num_drawn)
    tempered_TV = torch.softmax(oracle_logits / WARM.temperature, dim=-1).numpy()
    plain_TV = torch.log_softmax(oracle_logits, dim=-1).numpy()
    for row, token_ids in enumerate(found.token_ids):
        np.testing.assert_allclose(found.logprobs[row], plain_TV[row, token_ids], atol=2e-5)
        likeliest = int(tempered_TV[row].argmax())
        expected = tempered_TV[row, likeliest]
        spread = np.sqrt(expected * (1 - expected) / num_drawn)
        assert abs((token_ids == likeliest).mean() - expected) < 5 * spread + 1e-6


def test_more_alternatives_begin_with_the_same_ones_and_greedy_ones_are_the_likeliest(base, oracle_logits):
    key = key_of(seed=1, job="", sample_index=-1)
    few, many = (scores(base, PromptQuestions(num_drawn=count, key=key)).drawn.token_ids for count in (2, 5))
    np.testing.assert_array_equal(few, many[:, :2])
    greedy = Choice(temperature=0.0, top_k=-1, top_p=1.0)
    likeliest = scores(base, PromptQuestions(num_drawn=2, key=key), choice=greedy).drawn.token_ids
    np.testing.assert_array_equal(likeliest, oracle_logits[:-1].argmax(-1)[:, None].expand(-1, 2))
