"""Numbers that are not finite reach JSON clients by their values, wherever in an outcome they stand."""

import json

import msgspec
import numpy as np
import pytest

from gradstream.api.tinker.results import render
from gradstream.shared.wire import SampleDone, Sequence, TargetLogprobs, TopK


def packed(*logprobs: float) -> bytes:
    return np.array(logprobs, dtype="<f4").tobytes()


def top(*logprobs: float) -> TopK:
    token_ids = np.arange(len(logprobs), dtype="<i4").tobytes()
    return TopK(token_ids=token_ids, logprobs=packed(*logprobs), k=len(logprobs), length=1)


def sampled(*logprobs: float, topk: TopK | None = None) -> Sequence:
    tokens = np.arange(len(logprobs), dtype="<i4").tobytes()
    return Sequence(stop_reason="stop", tokens=tokens, logprobs=packed(*logprobs), topk=topk)


FINITE = SampleDone(sequences=[sampled(-0.5)], prompt_logprobs=packed(np.nan, -1.5))


@pytest.mark.parametrize(
    "changes",
    [
        {"sequences": [sampled(-0.5), sampled(np.inf)]},
        {"sequences": [sampled(-0.5, topk=top(-0.5, np.inf))]},
        {"prompt_logprobs": packed(np.nan, np.inf)},
        {"topk_prompt": top(np.inf)},
        {"target_prompt": TargetLogprobs(logprobs=packed(np.inf), shape=(1, 1))},
        {"alt_tokens": top(np.inf)},
    ],
    ids=["sampled", "its candidates", "prompt", "its candidates in the prompt", "targets", "draws"],
)
def test_an_infinite_logprob_of_a_sample_is_not_lost(changes: dict) -> None:
    content = render(msgspec.structs.replace(FINITE, **changes), accepts_protobuf=False).content
    assert b"Infinity" in content
    assert json.loads(content)["sequences"]


def test_positions_that_were_not_scored_are_null() -> None:
    content = render(FINITE, accepts_protobuf=False).content
    assert json.loads(content)["prompt_logprobs"] == [None, -1.5]
    assert b"NaN" not in content
