"""A finished request as the outcome of its job."""

import numpy as np
from numpy.typing import NDArray

from gradstream.engine.sampler.request import Finished, Sampled
from gradstream.engine.sampler.tables import TopKTable
from gradstream.shared.targets import PromptTargets
from gradstream.shared.wire import SampleDone, Sequence, TargetLogprobs, TopK


def to_wire(finished: Finished, *, targets: PromptTargets | None) -> SampleDone:
    """The outcome of a request that did not fail. targets: the table whose cells were scored, if one was sent."""
    assert finished.error is None
    scores = finished.scores
    return SampleDone(
        sequences=[_sequence(sampled) for sampled in finished.sequences],
        prompt_logprobs=None if scores.logprobs is None else scores.logprobs.astype("<f4").tobytes(),
        topk_prompt=_table(scores.topk),
        target_prompt=_targets(scores.targets, targets),
        alt_tokens=_table(scores.drawn),
    )


def _targets(logprobs: NDArray[np.float32] | None, targets: PromptTargets | None) -> TargetLogprobs | None:
    if logprobs is None or targets is None:
        return None
    return TargetLogprobs(
        logprobs=logprobs.astype("<f4").tobytes(),
        shape=targets.shape,
        crow_indices=targets.crow_indices,
        col_indices=targets.col_indices,
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
