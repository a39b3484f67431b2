"""A training pass on random tokens before anything is served.

Legend: P parameters of a model, N tokens of the pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter, new_adapter
from gradstream.engine.datums import Datums, datums_of
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.passes import AdapterWork, run_adapters, run_full
from gradstream.engine.rows import JobTensors
from gradstream.engine.state import EngineState
from gradstream.engine.trained import Owner
from gradstream.shared.columns import Column
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId
from gradstream.shared.wire import ForwardBackward, LoraSpec, Plan

_LENGTHS = (9, 6)
_RANK = 4
_PLAN = Plan(kind="forward_backward", future_ids=[], row_budget_tokens=sum(_LENGTHS))
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Between two runs on a GPU, whose kernels may add up in any order; relative.
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class _Run:
    """outputs: log-probabilities and losses, float32 [2N] on the CPU. norm and checksum: of the gradient."""

    outputs: Tensor
    norm: float
    checksum: int


def self_test(state: EngineState) -> None:
    """Run forward and backward of a few tokens twice, for the kind of model that this engine trains; not collective.

    Raises Unsupported, as a sentence that names enable_self_test, when it fails, a number is not finite, the gradient is zero, the
    second run gives other numbers (on a CPU, other bits), or weights have changed. Nothing is left of it.
    """
    before = _checksum(state.base.causal_lm.parameters())
    adapter = None if state.base.flat is not None else _adapter(state)
    try:
        first, second = (_run(state, adapter) for _ in range(2))
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _failure(f"a training pass of {sum(_LENGTHS)} tokens failed: {reason}") from error
    if not (bool(first.outputs.isfinite().all()) and np.isfinite(first.norm)):
        raise _failure("losses or gradients of random tokens hold nan or inf")
    if not first.norm:
        raise _failure("the gradient of random tokens is zero everywhere")
    if not _agree(first, second, exactly=state.base.device.type == "cpu"):
        raise _failure(
            f"the same tokens gave other numbers the second time (gradient norms {first.norm!r} and {second.norm!r})"
        )
    if _checksum(state.base.causal_lm.parameters()) != before:
        raise _failure("a training pass changed the weights, which only an optimizer may")


def _failure(what: str) -> Unsupported:
    return Unsupported(f"enable_self_test: {what}; the model cannot be trained here as it is")


def _run(state: EngineState, adapter: Adapter | None) -> _Run:
    datums = _datums(state)
    tensors: JobTensors
    if adapter is None:
        grad = torch.zeros(state.flat.layout.num_params, dtype=torch.float32, device=state.base.device)
        tensors = run_full(state.base, Comm.single(), datums, grad, _PLAN)
    else:
        work = AdapterWork(adapter=adapter, datums=datums, is_backward=True)
        (tensors,) = run_adapters(state.base, Comm.single(), [work], _PLAN)
    assert tensors.grad is not None
    return _Run(
        outputs=torch.cat([tensors.logprobs_NC.flatten(), tensors.elementwise_NC.flatten()]).cpu(),
        norm=float(torch.linalg.vector_norm(tensors.grad)),
        checksum=_checksum([tensors.grad]),
    )


def _agree(first: _Run, second: _Run, *, exactly: bool) -> bool:
    if exactly:
        return torch.equal(first.outputs, second.outputs) and first.checksum == second.checksum
    same_outputs = torch.allclose(first.outputs, second.outputs, rtol=_TOLERANCE, atol=_TOLERANCE)
    return same_outputs and abs(first.norm - second.norm) <= _TOLERANCE * first.norm


def _datums(state: EngineState) -> Datums:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, state.base.vocab_size, length + 1) for length in _LENGTHS]
    payload = ForwardBackward(
        tokens=Column.of([own[:-1].astype(np.int32) for own in tokens], dtype="int32"),
        inputs={"target_tokens": Column.of([own[1:].astype(np.int64) for own in tokens], dtype="int64")},
        loss_fn="cross_entropy",
    )
    return datums_of(payload, vocab_size=state.base.vocab_size, max_tokens=max(_LENGTHS))


def _adapter(state: EngineState) -> Adapter:
    """One that belongs to nobody, both of whose factors are random."""
    owner = Owner(
        model_id=ModelId("self-test"),
        tenant=LOCAL_TENANT,
        session_id=SessionId("self-test"),
        spec=LoraSpec(rank=min(_RANK, state.config.max_lora_rank), seed=0),
    )
    adapter = new_adapter(
        owner,
        base_sites=state.base.sites,
        lora_alpha=state.config.lora_alpha,
        engine_seed=state.config.seed,
        device=state.base.device,
    )
    noise = torch.randn(adapter.layout.num_params, generator=torch.Generator().manual_seed(0))
    adapter.weights.add_(noise.to(state.base.device), alpha=0.02)
    return adapter


@torch.no_grad()
def _checksum(tensors: Iterable[Tensor]) -> int:
    """The sum of all bits, taken as integers."""
    sums = [
        tensor.detach().flatten().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64) for tensor in tensors
    ]
    return sum(int(one) for one in sums)
