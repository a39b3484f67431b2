"""The rows of jobs run through the model on all ranks: every job's outputs and gradient, complete on every rank.

Legend: N tokens of one job, C candidates (targets) per token, P parameters of a model.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.datums import Datums
from gradstream.engine.models.base import BaseModel
from gradstream.engine.packing import Sharing, assign, pack
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.prefixes import find_prefixes
from gradstream.engine.rows import JobTensors, run_row
from gradstream.engine.transfer import to_device, to_host
from gradstream.shared.wire import Plan

# Matrix products may differ in the last bit with the alignment of what they write to. Each view of a buffer begins at a
# multiple of 64 bytes, as torch's own tensors do, so that a job's numbers do not depend on the sizes of the jobs before it.
_ALIGN_ELEMENTS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWork:
    """One job on an adapter. is_backward: its gradient is wanted."""

    adapter: Adapter
    datums: Datums
    is_backward: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOutputs:
    """A job's outputs in host memory, float32 [N, C]."""

    logprobs_NC: Tensor
    elementwise_NC: Tensor


def run_adapters(
    base: BaseModel,
    comm: Comm,
    work: Sequence[AdapterWork],
    plan: Plan,
    *,
    computing: AbstractContextManager[None] | None = None,
) -> list[JobTensors]:
    """Several jobs of several adapters in common rows; collective. Jobs that can be computed together become neighbours.

    computing: entered while this rank computes its share, in which nothing is collective.
    """
    # In which order the ranks are added up may depend on where a number lies in the buffer: an isolated job has one of its own.
    num_together = 1 if plan.isolate_jobs else len(work)
    order = _order(work, plan)
    buffers: list[Tensor] = []
    tensors: list[JobTensors] = []
    with nullcontext() if computing is None else computing:
        for first in range(0, len(work), num_together):
            buffer, own = _allocate([work[number] for number in order[first : first + num_together]], base.device)
            buffers.append(buffer)
            tensors += own
        _run_rows(base, comm, tensors, plan)
    # What a rank did not compute is zero in its buffer, so the sum is the whole.
    for buffer in buffers:
        comm.all_reduce_sum_(buffer)
    return [one for _, one in sorted(zip(order, tensors, strict=True), key=lambda item: item[0])]


def _order(work: Sequence[AdapterWork], plan: Plan) -> list[int]:
    """The jobs by the shapes of their adapters, and then by their tokens; as they came where each is isolated."""
    numbers = list(range(len(work)))
    if plan.isolate_jobs:
        return numbers

    def shape(number: int) -> tuple[str, int, int]:
        one = work[number]
        return one.adapter.layout.digest, one.adapter.factors.frozen_rank, one.datums.num_tokens

    return sorted(numbers, key=shape)


def run_full(
    base: BaseModel,
    comm: Comm,
    datums: Datums,
    grad: Tensor | None,
    plan: Plan,
    *,
    computing: AbstractContextManager[None] | None = None,
) -> JobTensors:
    """One job on the base model's own weights; collective. grad: flat fp32 [P] that its gradient is added to, None for a forward.

    What grad held on all ranks is summed too, so only one of them may hold what was accumulated before. computing: as of `run_adapters`.
    """
    num_outputs = datums.num_tokens * datums.num_candidates
    with nullcontext() if computing is None else computing:
        outputs = torch.zeros(2, num_outputs, dtype=torch.float32, device=base.device)
        tensors = _job_tensors(None, datums, grad=grad, logprobs=outputs[0], elementwise=outputs[1])
        _run_rows(base, comm, [tensors], plan)
    comm.all_reduce_sum_(outputs)
    if grad is not None:
        comm.all_reduce_sum_(grad)
    return tensors


def _run_rows(base: BaseModel, comm: Comm, tensors: Sequence[JobTensors], plan: Plan) -> None:
    shared_from = plan.shared_prompt_tokens
    paths = [find_prefixes(job.datums.tokens_N, job.datums.lengths, min_tokens=shared_from) for job in tensors]
    rows = pack(
        [job.datums.lengths for job in tensors],
        budget_tokens=plan.row_budget_tokens,
        num_ranks=comm.size,
        isolate_jobs=plan.isolate_jobs,
        packing=plan.packing,
        sharing=Sharing(paths=paths, num_candidates=[job.datums.num_candidates for job in tensors]),
    )
    ranks = assign(rows, num_ranks=comm.size, isolate_jobs=plan.isolate_jobs)
    for row, rank in zip(rows, ranks, strict=True):
        if rank == comm.rank:
            run_row(base, row, tensors)


def _allocate(work: Sequence[AdapterWork], device: torch.device) -> tuple[Tensor, list[JobTensors]]:
    """One flat fp32 buffer for these jobs, and each job's views into it."""
    # Gradients first: those of adapters of one shape lie at equal distances, so that products for all of them can add to them.
    sizes = [one.adapter.layout.num_params if one.is_backward else 0 for one in work]
    sizes += [one.datums.num_tokens * one.datums.num_candidates for one in work for _ in range(2)]
    padded = [-(-size // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS for size in sizes]
    buffer = torch.zeros(sum(padded), dtype=torch.float32, device=device)
    parts = [part[:size] for part, size in zip(torch.split(buffer, padded), sizes, strict=True)]
    tensors = []
    outputs = iter(parts[len(work) :])
    for one, grad in zip(work, parts, strict=False):
        own_grad = grad if one.is_backward else None
        logprobs, elementwise = next(outputs), next(outputs)
        tensors.append(_job_tensors(one.adapter, one.datums, grad=own_grad, logprobs=logprobs, elementwise=elementwise))
    return buffer, tensors


def _job_tensors(
    adapter: Adapter | None, datums: Datums, *, grad: Tensor | None, logprobs: Tensor, elementwise: Tensor
) -> JobTensors:
    """A job's arrays on the device of its outputs."""
    device = logprobs.device
    shape = datums.targets_NC.shape
    return JobTensors(
        adapter=adapter,
        datums=datums,
        tokens_N=to_device(datums.tokens_N, device),
        targets_NC=to_device(datums.targets_NC, device),
        inputs={name: to_device(values, device) for name, values in datums.inputs.items()},
        grad=grad,
        logprobs_NC=logprobs.view(shape),
        elementwise_NC=elementwise.view(shape),
    )


def on_host(jobs: Sequence[JobTensors], verdicts: Sequence[Tensor] = ()) -> tuple[list[HostOutputs], list[bool]]:
    """The jobs' outputs, and what bool tensors say: the one wait for the device of all that the jobs took."""
    outputs = [tensor for job in jobs for tensor in (job.logprobs_NC, job.elementwise_NC)]
    fetched = to_host([*outputs, *verdicts])
    pairs = zip(fetched[: len(outputs) : 2], fetched[1 : len(outputs) : 2], strict=True)
    return [HostOutputs(logprobs_NC=one, elementwise_NC=other) for one, other in pairs], [
        bool(verdict) for verdict in fetched[len(outputs) :]
    ]
