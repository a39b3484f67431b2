"""A finished request as the outcome of its job."""

import numpy as np

from gradstream.engine.sampler.request import Finished, Sampled
from gradstream.engine.sampler.tables import TopKTable
from gradstream.shared.wire import SampleDone, Sequence, TopK


def to_wire(finished: Finished) -> SampleDone:
    """The outcome of a request that did not fail."""
    assert finished.error is None
    scored = finished.prompt_logprobs
    return SampleDone(
        sequences=[_sequence(sampled) for sampled in finished.sequences],
        prompt_logprobs=None if scored is None else scored.astype("<f4").tobytes(),
        topk_prompt=_table(finished.topk_prompt),
    )


def _sequence(sampled: Sampled) -> Sequence:
    return Sequence(
        stop_reason=sampled.stop_reason,
        tokens=np.array(sampled.tokens, dtype="<i4").tobytes(),
        logprobs=np.array(sampled.logprobs, dtype="<f4").tobytes(),
        topk=_table(sampled.topk),
    )


def _table(table: TopKTable | None) -> TopK | None:
    if table is None:
        return None
    length, k = table.token_ids.shape
    return TopK(
        token_ids=table.token_ids.astype("<i4").tobytes(),
        logprobs=table.logprobs.astype("<f4").tobytes(),
        k=k,
        length=length,
    )
