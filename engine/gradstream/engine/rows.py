"""One packed row through the model: log-probabilities, losses and gradients.

Legend: T tokens that are computed, E tokens of the row's datums (the same, unless some are shared), C candidates (targets) per token, W
columns of the head, N tokens of one job.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.adapters.slices import AdapterSlice
from gradstream.engine.datums import Datums
from gradstream.engine.head import Head
from gradstream.engine.losses._base import SWITCHES, LossArguments, LossResult
from gradstream.engine.losses._valid import Valid, evaluate_valid
from gradstream.engine.models.base import BaseModel
from gradstream.engine.packing import Row
from gradstream.engine.places import Places
from gradstream.engine.transfer import to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class JobTensors:
    """A job of the batch on the device, and where its results go.

    adapter: None where the base model's own weights are trained. grad: flat in the model's layout, added to; None for a
    forward. logprobs_NC and elementwise_NC are written; tokens without a target have zeros there.
    """

    adapter: Adapter | None
    datums: Datums
    tokens_N: Tensor
    targets_NC: Tensor
    inputs: dict[str, Tensor]
    grad: Tensor | None
    logprobs_NC: Tensor
    elementwise_NC: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """Datums of a job that follow one another: their tokens among the row's E, [start, end), and among the job's own, [first, last)."""

    job: JobTensors
    start: int
    end: int
    first: int
    last: int
    lengths: list[int]


def run_row(base: BaseModel, row: Row, jobs: Sequence[JobTensors]) -> None:
    """Write every placed datum's outputs, and add its gradient to its job's buffer where there is one.

    Nothing here waits for the device, unless the model has experts. Where the base model's own weights are trained, all of a row is of
    one job.
    """
    spans = _spans(row, jobs)
    is_training = any(span.job.grad is not None for span in spans)
    adapters = _adapters(base, spans, row)
    targets_EC = _targets(spans)
    tokens_T = torch.cat([span.job.tokens_N[span.first : span.last] for span in spans])
    places = None
    if row.layout is None:
        context = base.packed([placement.length for placement in row.placements])
    else:
        context = base.packed(row.layout.lengths, row.layout.parents)
        places = Places(row.layout, num_candidates=targets_EC.shape[1], device=base.device)
        tokens_T = tokens_T[places.source_T]
    with torch.set_grad_enabled(is_training):
        hidden_TD = base.hidden(tokens_T, context.segments.positions, attention=context, adapters=adapters)

    own_grad = spans[0].job.grad
    head = Head(base, hidden_TD, adapters, weight_grad_VD=base.head_grad(own_grad))
    if places is None:
        logprobs_EC = head.logprobs(targets_EC, keep=is_training)
    else:
        logprobs_EC = places.collect(head.logprobs(places.spread(targets_EC), keep=is_training))
    grad_EC = _losses(spans, logprobs_EC)
    if is_training:
        may_learn = np.concatenate([_may_learn(span) for span in spans])
        if row.layout is not None:
            may_learn = row.layout.any_of_computed(may_learn)
        grad_hidden_TD = head.backward(grad_EC if places is None else places.spread(grad_EC), may_learn)
        if grad_hidden_TD is not None and hidden_TD.requires_grad:
            with base.collecting(own_grad):
                torch.autograd.backward(hidden_TD, grad_hidden_TD)


def _losses(spans: Sequence[_Span], logprobs_EC: Tensor) -> Tensor:
    """Write the outputs of each span; returns the gradient of the log-probabilities, [E, C], 0 where there is none."""
    grad_EC = torch.zeros_like(logprobs_EC)
    for own in _of_one_loss(spans):
        width = own[0].job.datums.num_candidates
        part = slice(own[0].start, own[-1].end), slice(width)
        is_valid_N = _valid(own)
        logprobs_NC = _of_valid(logprobs_EC[part], is_valid_N)
        result = _loss(own, logprobs_NC, is_valid_N)
        sizes = [span.end - span.start for span in own]
        outputs = zip(own, torch.split(logprobs_NC, sizes), torch.split(result.elementwise_TC, sizes), strict=True)
        for span, logprobs, elementwise in outputs:
            span.job.logprobs_NC[span.first : span.last] = logprobs
            span.job.elementwise_NC[span.first : span.last] = elementwise
        if result.grad_TC is not None:
            # A loss that is not finite fails its job; its gradient is never used. Nothing waits for the device to tell.
            of_spans = torch.split(result.elementwise_TC.isfinite(), sizes)
            is_finite_N1 = torch.cat([one.all().expand(size, 1) for one, size in zip(of_spans, sizes, strict=True)])
            grad_EC[part] = torch.where(is_finite_N1, result.grad_TC, 0.0)
    return grad_EC


def _of_one_loss(spans: Sequence[_Span]) -> Iterator[list[_Span]]:
    """Neighbours that are computed at once: no datum's loss depends on another's."""
    own: list[_Span] = []
    for span in spans:
        if own and not _is_one_loss(own[-1].job, span.job):
            yield own
            own = []
        own.append(span)
    yield own


def _is_one_loss(one: JobTensors, other: JobTensors) -> bool:
    mine, others = one.datums, other.datums
    if mine.loss is not others.loss or mine.params != others.params or mine.inputs.keys() != others.inputs.keys():
        return False
    return mine.num_candidates == others.num_candidates and (one.grad is None) == (other.grad is None)


def _may_learn(span: _Span) -> NDArray[np.bool_]:
    """[N]: False for a token whose gradient is zero whatever the model says: without target, switched off, or of a forward."""
    datums = span.job.datums
    own = slice(span.first, span.last)
    may_N = np.full(span.last - span.first, span.job.grad is not None)
    if datums.is_valid_N is not None:
        may_N &= datums.is_valid_N[own]
    for name in SWITCHES:
        if name in datums.inputs:
            may_N &= (datums.inputs[name][own] != 0).any(axis=1)
    return may_N


def _adapters(base: BaseModel, spans: Sequence[_Span], row: Row) -> AdapterPass | None:
    """The adapters of the row; None where the base model's own weights are trained."""
    if base.flat is not None:
        assert all(span.job is spans[0].job for span in spans)
        return None
    slices = []
    for number, (_, group) in enumerate(groupby(spans, key=lambda span: id(span.job))):
        own = list(group)
        job = own[0].job
        start, end = (own[0].start, own[-1].end) if row.layout is None else row.layout.bounds[number]
        slices.append(AdapterSlice(start=start, end=end, weights=job.adapter, grad=job.grad))
    return AdapterPass(slices, compute_dtype=base.compute_dtype)


def _spans(row: Row, jobs: Sequence[JobTensors]) -> list[_Span]:
    spans = []
    at = 0
    # Where a datum between two others lies in another row, these are no longer neighbours.
    runs = groupby(enumerate(row.placements), key=lambda item: (item[1].job, item[1].datum - item[0]))
    for (number, _), group in runs:
        placements = [placement for _, placement in group]
        lengths = [placement.length for placement in placements]
        first = sum(jobs[number].datums.lengths[: placements[0].datum])
        size = sum(lengths)
        spans.append(_Span(job=jobs[number], start=at, end=at + size, first=first, last=first + size, lengths=lengths))
        at += size
    return spans


def _targets(spans: Sequence[_Span]) -> Tensor:
    """int64 [E, C] for the widest job; narrower ones repeat token 0, which nobody reads."""
    width = max(span.job.datums.num_candidates for span in spans)
    parts_NC = []
    for span in spans:
        targets_NC = span.job.targets_NC[span.first : span.last]
        missing = width - span.job.datums.num_candidates
        parts_NC.append(torch.nn.functional.pad(targets_NC, (0, missing)) if missing else targets_NC)
    return torch.cat(parts_NC)


def _valid(spans: Sequence[_Span]) -> Valid:
    """Which of the spans' tokens have a target."""
    if all(span.job.datums.is_valid_N is None for span in spans):
        return None
    parts = [
        np.ones(span.end - span.start, dtype=np.bool_) if is_valid_N is None else is_valid_N[span.first : span.last]
        for span, is_valid_N in ((span, span.job.datums.is_valid_N) for span in spans)
    ]
    return np.concatenate(parts)


def _of_valid(logprobs_NC: Tensor, is_valid_N: Valid) -> Tensor:
    """logprobs_NC with 0 for tokens without a target."""
    if is_valid_N is None:
        return logprobs_NC
    mask_N = to_device(is_valid_N, logprobs_NC.device)
    return torch.where(mask_N[:, None], logprobs_NC, torch.zeros_like(logprobs_NC))


def _loss(spans: Sequence[_Span], logprobs_NC: Tensor, is_valid_N: Valid) -> LossResult:
    """Of spans with one loss."""
    job = spans[0].job
    arguments = LossArguments(
        logprobs_TC=logprobs_NC,
        held_TC=logprobs_NC,
        inputs={
            name: _joined([span.job.inputs[name][span.first : span.last] for span in spans]) for name in job.inputs
        },
        params=job.datums.params,
        lengths=[length for span in spans for length in span.lengths],
    )
    return evaluate_valid(job.datums.loss, arguments, is_valid_N, with_grad=job.grad is not None)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
