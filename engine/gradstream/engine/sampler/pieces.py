"""A request for many samples as pieces that fit into the sampler side by side, and their answers as one."""

from collections.abc import Sequence
from dataclasses import replace

from gradstream.engine.sampler.request import Finished, PromptQuestions, SampleRequest
from gradstream.engine.sampler.scheduler import SamplerLimits


def pieces_of(request: SampleRequest, limits: SamplerLimits) -> list[SampleRequest]:
    """Requests that ask for the same samples in order, each for as many as limits allow at a time; the first asks about the prompt.

    Without this the memory of one request would grow with its num_samples, whatever the machine has.
    """
    width = max(1, min(limits.max_rows, limits.max_cache_tokens // request.longest))
    if request.num_samples <= width:
        return [request]
    return [
        replace(
            request,
            keys=request.keys[start : start + width],
            questions=request.questions if start == 0 else PromptQuestions(),
        )
        for start in range(0, request.num_samples, width)
    ]


def joined(request: SampleRequest, answers: Sequence[Finished]) -> Finished:
    """The answer to request from those to its pieces, in their order; the first error among them fails it."""
    for answer in answers:
        if answer.error is not None:
            return Finished(request=request, sequences=[], error=answer.error)
    sequences = [sampled for answer in answers for sampled in answer.sequences]
    return Finished(request=request, sequences=sequences, scores=answers[0].scores)
