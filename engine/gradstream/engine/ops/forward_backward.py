"""Losses of datums, with gradients added to the model's accumulator; several models share the passes.

Legend: N tokens of one job, C candidates (targets) per token.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradstream.engine import losses
from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.datums import Datums, datums_of
from gradstream.engine.losses._base import LossArguments
from gradstream.engine.ops.registry import OPS, OpJob
from gradstream.engine.packing import assign, pack
from gradstream.engine.registry import import_siblings
from gradstream.engine.rows import JobTensors, run_row
from gradstream.engine.state import EngineState
from gradstream.shared.columns import Column
from gradstream.shared.errors import GradstreamError, NonFinite
from gradstream.shared.wire import Failed, ForwardBackward, ForwardBackwardDone, Outcome, Plan

import_siblings(losses)

# Matrix products may differ in the last bit with the alignment of what they write to. Each view of a buffer begins at a
# multiple of 64 bytes, as torch's own tensors do, so that a job's numbers do not depend on the sizes of the jobs before it.
_ALIGN_ELEMENTS = 16


@OPS.register(ForwardBackward)
def forward_backward(state: EngineState, jobs: Sequence[OpJob[ForwardBackward]]) -> list[Outcome]:
    """Run all jobs together, row by row; each rank runs its rows, and an all-reduce makes every rank hold everything.

    A job that is refused, or whose loss or gradient is not finite, changes no accumulator.
    """
    outcomes: list[Outcome | None] = [None] * len(jobs)
    accepted: list[int] = []
    work: list[tuple[Adapter, Datums]] = []
    for number, job in enumerate(jobs):
        try:
            work.append((state.model(job.job), _datums(state, job.payload)))
            accepted.append(number)
        except GradstreamError as error:
            outcomes[number] = Failed.of(error)
    if work:
        tensors = _run(state, work, [jobs[number].payload.backward for number in accepted], jobs[0].plan)
        for number, job_tensors in zip(accepted, tensors, strict=True):
            outcomes[number] = _finish(job_tensors)
    return [outcome for outcome in outcomes if outcome is not None]


def _datums(state: EngineState, payload: ForwardBackward) -> Datums:
    return datums_of(payload, vocab_size=state.base.vocab_size, max_tokens=state.max_context_tokens)


def _run(
    state: EngineState, work: Sequence[tuple[Adapter, Datums]], backward: Sequence[bool], plan: Plan
) -> list[JobTensors]:
    """Every job's gradient and outputs, complete on every rank."""
    # In which order the ranks are added up may depend on where a number lies in the buffer: an isolated job has one of its own.
    num_together = 1 if plan.isolate_jobs else len(work)
    buffers: list[Tensor] = []
    tensors: list[JobTensors] = []
    for first in range(0, len(work), num_together):
        together = slice(first, first + num_together)
        buffer, own = _allocate(state, work[together], backward[together])
        buffers.append(buffer)
        tensors += own
    rows = pack(
        [datums.lengths for _, datums in work],
        budget_tokens=plan.row_budget_tokens,
        num_ranks=state.comm.size,
        isolate_jobs=plan.isolate_jobs,
    )
    ranks = assign(rows, num_ranks=state.comm.size, isolate_jobs=plan.isolate_jobs)
    for row, rank in zip(rows, ranks, strict=True):
        if rank == state.comm.rank:
            run_row(state.base, row, tensors)
    # What a rank did not compute is zero in its buffer, so the sum is the whole.
    for buffer in buffers:
        state.comm.all_reduce_sum_(buffer)
    return tensors


def _allocate(
    state: EngineState, work: Sequence[tuple[Adapter, Datums]], backward: Sequence[bool]
) -> tuple[Tensor, list[JobTensors]]:
    """One flat fp32 buffer for these jobs, and each job's views into it."""
    device = state.base.device
    sizes: list[int] = []
    for (adapter, datums), is_backward in zip(work, backward, strict=True):
        num_outputs = datums.num_tokens * datums.num_candidates
        sizes += [adapter.layout.num_params if is_backward else 0, num_outputs, num_outputs]
    padded = [-(-size // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS for size in sizes]
    buffer = torch.zeros(sum(padded), dtype=torch.float32, device=device)
    parts = [part[:size] for part, size in zip(torch.split(buffer, padded), sizes, strict=True)]
    tensors = []
    for number, ((adapter, datums), is_backward) in enumerate(zip(work, backward, strict=True)):
        grad, logprobs, elementwise = parts[3 * number : 3 * number + 3]
        shape = datums.targets_NC.shape
        tensors.append(
            JobTensors(
                adapter=adapter,
                datums=datums,
                tokens_N=_to(datums.tokens_N, device),
                targets_NC=_to(datums.targets_NC, device),
                inputs={name: _to(values, device) for name, values in datums.inputs.items()},
                grad=grad if is_backward else None,
                logprobs_NC=logprobs.view(shape),
                elementwise_NC=elementwise.view(shape),
            )
        )
    return buffer, tensors


def _to(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> Tensor:
    """A copy on the device; wire arrays are read-only, which torch does not accept."""
    return torch.tensor(array, device=device)


def _finish(job: JobTensors) -> Outcome:
    """Accumulate a finished job's gradient and give its outcome; NonFinite leaves the accumulator as it was."""
    try:
        elementwise_NC = job.elementwise_NC.cpu()
        _check_loss(job.datums, elementwise_NC)
        if job.grad is not None:
            _accumulate(job.adapter, job.grad)
    except GradstreamError as error:
        return Failed.of(error)
    return _done(job, elementwise_NC)


def _check_loss(datums: Datums, elementwise_NC: Tensor) -> None:
    bad_N = ~elementwise_NC.isfinite().all(dim=1)
    if bool(bad_N.any()):
        token = int(bad_N.nonzero()[0])
        ends = np.cumsum(datums.lengths)
        datum = int(np.searchsorted(ends, token, side="right"))
        position = token - int(ends[datum]) + datums.lengths[datum]
        raise NonFinite(
            f"the {datums.loss.card.name} loss of datum {datum} is {float(elementwise_NC[token].sum())} at position {position}; "
            "nothing was accumulated"
        )


def _accumulate(adapter: Adapter, grad: Tensor) -> None:
    total = adapter.grad + grad
    if not bool(total.isfinite().all()):
        what = "gradient" if not bool(grad.isfinite().all()) else "accumulated gradient"
        raise NonFinite(f"the {what} of model {adapter.model_id} holds nan or inf; nothing was accumulated")
    adapter.grad.copy_(total)
    adapter.has_grad = True


def _done(job: JobTensors, elementwise_NC: Tensor) -> ForwardBackwardDone:
    datums = job.datums
    outputs = {
        "logprobs": _column(job.logprobs_NC.cpu(), datums),
        "elementwise_loss": _column(elementwise_NC, datums),
    }
    # Summed in float64 over all tokens in submission order: the same for every packing and number of ranks.
    metrics = {"loss:sum": float(elementwise_NC.double().sum())}
    if datums.loss.measure is not None:
        metrics |= datums.loss.measure(
            LossArguments(
                logprobs_TC=job.logprobs_NC,
                held_TC=job.logprobs_NC,
                inputs=job.inputs,
                params=datums.params,
                lengths=datums.lengths,
            )
        )
    return ForwardBackwardDone(outputs=outputs, metrics=metrics, backward=job.grad is not None)


def _column(values_NC: Tensor, datums: Datums) -> Column:
    lengths = np.asarray(datums.lengths, dtype="<i8")
    data = np.ascontiguousarray(values_NC.numpy(), dtype="<f4").tobytes()
    return Column(dtype="float32", lengths=lengths.tobytes(), data=data, trailing=datums.trailing)
