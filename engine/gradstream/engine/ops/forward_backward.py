"""Losses of datums, with gradients added to the model's accumulator; several adapters share the passes.

Legend: N tokens of one job, C candidates (targets) per token.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from gradstream.engine import losses
from gradstream.engine.accumulation import Undo, accumulate, are_finite_sums, is_finite_sum
from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.datums import Datums, datums_of
from gradstream.engine.losses._base import LossArguments
from gradstream.engine.losses._valid import measure_valid
from gradstream.engine.memory import memory_as_failure
from gradstream.engine.models.full import FullModel
from gradstream.engine.observe import log_gradient_norms, logging_router_loads
from gradstream.engine.ops.registry import OPS, OpJob
from gradstream.engine.passes import AdapterWork, HostOutputs, on_host, run_adapters, run_full
from gradstream.engine.registry import import_siblings
from gradstream.engine.rows import JobTensors
from gradstream.engine.state import EngineState
from gradstream.engine.trained import TrainedModel
from gradstream.shared.columns import Column
from gradstream.shared.errors import GradstreamError, InvalidRequest, NonFinite, OutOfMemory
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import IGNORE, Failed, ForwardBackward, ForwardBackwardDone, Outcome, Plan

import_siblings(losses)


@OPS.register(ForwardBackward)
def forward_backward(state: EngineState, jobs: Sequence[OpJob[ForwardBackward]]) -> list[Outcome]:
    """Run the jobs; each rank runs its rows, and an all-reduce makes every rank hold everything.

    Jobs of adapters run together, row by row; jobs on the base model's own weights one after the other. A job that is refused, or
    whose loss or gradient is not finite, changes no accumulator.
    """
    with logging_router_loads(state):
        return _run(state, jobs)


def _run(state: EngineState, jobs: Sequence[OpJob[ForwardBackward]]) -> list[Outcome]:
    outcomes: list[Outcome | None] = [None] * len(jobs)
    adapter_work: dict[int, AdapterWork] = {}
    for number, job in enumerate(jobs):
        try:
            model = state.model(job.job)
            datums = _datums(state, model, job.payload)
        except GradstreamError as error:
            outcomes[number] = Failed.of(error)
            continue
        is_backward = job.payload.backward
        if isinstance(model, Adapter):
            adapter_work[number] = AdapterWork(adapter=model, datums=datums, is_backward=is_backward)
        else:
            outcomes[number] = _run_full(state, model, datums, is_backward=is_backward, plan=job.plan)
    if adapter_work:
        finished = _run_adapters(state, list(adapter_work.values()), jobs[0].plan)
        for number, outcome in zip(adapter_work, finished, strict=True):
            outcomes[number] = outcome
    return [outcome for outcome in outcomes if outcome is not None]


def _datums(state: EngineState, model: TrainedModel, payload: ForwardBackward) -> Datums:
    """Raises InvalidRequest or Unsupported."""
    datums = datums_of(payload, vocab_size=state.base.vocab_size, max_tokens=state.max_context_tokens)
    if model.reduction == "token_mean" and not datums.num_valid:
        raise InvalidRequest(
            f"loss_fn_inputs.target_tokens: every target is {IGNORE}, so there is no token to take the mean over"
        )
    return datums


def _run_adapters(
    state: EngineState, work: Sequence[AdapterWork], plan: Plan
) -> Sequence[ForwardBackwardDone | Failed]:
    """Jobs that share rows, so what has no room fails all of them; collective.

    Before that, adapters that this batch does not use leave the device, and it is tried once more.
    """
    try:
        tensors = state.with_room(lambda: run_adapters(state.base, state.comm, work, plan, computing=_computing(state)))
    except OutOfMemory as error:
        return [Failed.of(error)] * len(work)
    pending = _verdicts(work, tensors)
    outputs, found = on_host(tensors, list(pending.values()))
    verdicts = dict(zip(pending, found, strict=True))
    return [
        _finish(state, one.adapter, job, outputs[number], is_finite=verdicts.get(number))
        for number, (one, job) in enumerate(zip(work, tensors, strict=True))
    ]


def _verdicts(work: Sequence[AdapterWork], tensors: Sequence[JobTensors]) -> dict[int, Tensor]:
    """Which jobs' gradients may be accumulated, by number; of each model the first, since the others depend on its outcome."""
    first: dict[ModelId, int] = {}
    sums = []
    for number, (one, job) in enumerate(zip(work, tensors, strict=True)):
        if job.grad is not None and one.adapter.model_id not in first:
            first[one.adapter.model_id] = number
            sums.append((one.adapter, job.grad))
    return dict(zip(first.values(), are_finite_sums(sums), strict=True))


def _run_full(
    state: EngineState, model: FullModel, datums: Datums, *, is_backward: bool, plan: Plan
) -> ForwardBackwardDone | Failed:
    """One job on the base model's own weights; collective.

    Its gradient goes straight into the accumulator, since there is often no room for another of this size. What was there before
    waits in host memory for the case that the job fails.
    """
    if not is_backward:
        return _try_full(state, model, datums, None, plan)
    undo = Undo(model.grad) if model.has_grad else None
    if not state.comm.is_leader:
        # The sum over all ranks has what was accumulated before once.
        model.grad.zero_()
    outcome = _try_full(state, model, datums, model.grad, plan, before=undo)
    if isinstance(outcome, Failed):
        if undo is None:
            model.clear_grad()
        else:
            undo.restore(model.grad)
    return outcome


def _try_full(
    state: EngineState, model: FullModel, datums: Datums, grad: Tensor | None, plan: Plan, *, before: Undo | None = None
) -> ForwardBackwardDone | Failed:
    try:
        job = run_full(state.base, state.comm, datums, grad, plan, computing=_computing(state))
    except OutOfMemory as error:
        return Failed.of(error)
    pending = [] if job.grad is None else [is_finite_sum(model, job.grad)]
    (outputs,), verdicts = on_host([job], pending)
    return _finish(state, model, job, outputs, is_finite=verdicts[0] if verdicts else None, before=before)


def _computing(state: EngineState) -> AbstractContextManager[None]:
    return memory_as_failure(state.comm, what="forward_backward")


def _finish(
    state: EngineState,
    model: TrainedModel,
    job: JobTensors,
    outputs: HostOutputs,
    *,
    is_finite: bool | None = None,
    before: Undo | None = None,
) -> ForwardBackwardDone | Failed:
    """Accumulate a finished job's gradient and give its outcome.

    is_finite: whether the sum of accumulator and gradient is, where that is known. before: the accumulator ahead of a job that added
    to it.
    """
    try:
        _check_loss(job.datums, outputs.elementwise_NC)
        if job.grad is not None:
            accumulate(model, job.grad, num_valid=job.datums.num_valid, is_finite=is_finite)
            log_gradient_norms(state, model, job.grad, before=before)
    except GradstreamError as error:
        return Failed.of(error)
    return _done(model, job.datums, outputs, is_backward=job.grad is not None)


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


def _done(model: TrainedModel, datums: Datums, host: HostOutputs, *, is_backward: bool) -> ForwardBackwardDone:
    outputs = {
        "logprobs": _column(host.logprobs_NC, datums),
        "elementwise_loss": _column(host.elementwise_NC, datums),
    }
    # Summed in float64 over all tokens in submission order: the same for every packing and number of ranks.
    loss = float(host.elementwise_NC.double().sum())
    metrics = {"loss:sum": loss}
    if model.reduction == "token_mean":
        outputs["loss"] = _datum_means(host.elementwise_NC, datums)
        metrics |= {"loss:mean": loss / datums.num_valid, "valid_tokens:sum": float(datums.num_valid)}
    if datums.loss.measure is not None:
        arguments = LossArguments(
            logprobs_TC=host.logprobs_NC,
            held_TC=host.logprobs_NC,
            inputs={name: torch.tensor(values) for name, values in datums.inputs.items()},
            params=datums.params,
            lengths=datums.lengths,
        )
        metrics |= measure_valid(datums.loss, arguments, datums.is_valid_N)
    return ForwardBackwardDone(outputs=outputs, metrics=metrics, backward=is_backward)


def _datum_means(elementwise_NC: Tensor, datums: Datums) -> Column:
    """Each datum's loss, the mean over its valid tokens, [1]; 0 where it has none."""
    lengths = np.asarray(datums.lengths)
    datum_N = np.repeat(np.arange(lengths.size), lengths)
    sums = np.bincount(datum_N, weights=elementwise_NC.double().sum(dim=1).numpy(), minlength=lengths.size)
    is_valid_N = np.ones(len(datum_N)) if datums.is_valid_N is None else datums.is_valid_N
    counts = np.bincount(datum_N, weights=is_valid_N, minlength=lengths.size)
    means = (sums / np.maximum(counts, 1)).astype("<f4")
    return Column(dtype="float32", lengths=np.ones(lengths.size, dtype="<i8").tobytes(), data=means.tobytes())


def _column(values_NC: Tensor, datums: Datums) -> Column:
    lengths = np.asarray(datums.lengths, dtype="<i8")
    data = np.ascontiguousarray(values_NC.numpy(), dtype="<f4").tobytes()
    return Column(dtype="float32", lengths=lengths.tobytes(), data=data, trailing=datums.trailing)
