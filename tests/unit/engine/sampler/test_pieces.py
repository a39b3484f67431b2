"""One request for more samples than fit at a time gives what it would have given at once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gradstream.engine.models.build import Build, load_base
from gradstream.engine.sampler.choice import Choice, key_of
from gradstream.engine.sampler.pieces import joined, pieces_of
from gradstream.engine.sampler.request import Finished, PromptQuestions, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerEngine, SamplerLimits
from gradstream.engine.sampler.stops import StopRule
from gradstream.shared.errors import NonFinite

PROMPT = np.arange(40, 60, dtype=np.int32)


def request(num_samples: int, *, max_tokens: int = 6) -> SampleRequest:
    return SampleRequest(
        name="one",
        adapter=None,
        prompt=PROMPT,
        max_tokens=max_tokens,
        choice=Choice(temperature=1.0, top_k=-1, top_p=1.0),
        stop=StopRule(token_ids=frozenset()),
        keys=tuple(key_of(seed=1, job="", sample_index=index) for index in range(num_samples)),
        questions=PromptQuestions(logprobs=True),
    )


@pytest.mark.parametrize(
    ("limits", "num_samples", "sizes"),
    [
        (SamplerLimits(max_rows=4), 1, [1]),
        (SamplerLimits(max_rows=4), 4, [4]),
        (SamplerLimits(max_rows=4), 9, [4, 4, 1]),
        (SamplerLimits(max_cache_tokens=50), 3, [2, 1]),
        (SamplerLimits(max_cache_tokens=1), 2, [1, 1]),
    ],
    ids=["one", "just fits", "rows", "cache", "less than one"],
)
def test_a_piece_has_as_many_samples_as_fit(limits: SamplerLimits, num_samples: int, sizes: list[int]) -> None:
    whole = request(num_samples)
    pieces = pieces_of(whole, limits)
    assert [piece.num_samples for piece in pieces] == sizes
    assert tuple(key for piece in pieces for key in piece.keys) == whole.keys
    assert [piece.questions.logprobs for piece in pieces] == [True] + [False] * (len(pieces) - 1)


@pytest.mark.parametrize("max_tokens", [1, 6], ids=["prompt alone", "several tokens"])
def test_the_pieces_together_answer_like_the_whole_and_never_hold_more_rows_than_fit(max_tokens: int) -> None:
    base = load_base(
        Path("tests/models/tiny-qwen3-shakespeare"),
        device=torch.device("cpu"),
        dtype=torch.float32,
        build=Build(attention="segment_sdpa"),
    )
    limits, whole = SamplerLimits(max_rows=3), request(8, max_tokens=max_tokens)

    def run(parts: list[SampleRequest], engine: SamplerEngine) -> Finished:
        for part in parts:
            engine.add(part)
        done: dict[int, Finished] = {}
        while engine.has_work():
            done |= {id(one.request): one for one in engine.step()}
            assert len(engine.live) <= engine.limits.max_rows
        return joined(whole, [done[id(part)] for part in parts])

    expected = run([whole], SamplerEngine(base=base, limits=SamplerLimits(max_rows=8)))
    answer = run(pieces_of(whole, limits), SamplerEngine(base=base, limits=limits))
    assert [one.tokens for one in answer.sequences] == [one.tokens for one in expected.sequences]
    np.testing.assert_allclose(
        [one.logprobs for one in answer.sequences], [one.logprobs for one in expected.sequences], atol=1e-5
    )
    np.testing.assert_allclose(answer.scores.logprobs, expected.scores.logprobs, atol=1e-5)


def test_one_failed_piece_fails_the_request() -> None:
    whole = request(2)
    answers = [Finished(request=whole, sequences=[]), Finished(request=whole, sequences=[], error=NonFinite("nan"))]
    answer = joined(whole, answers)
    assert answer.error is answers[1].error
    assert answer.sequences == []
