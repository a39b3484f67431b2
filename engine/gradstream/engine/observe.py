"""What training looks like from inside, as log events at level DEBUG; nothing is computed while that level is off.

Legend: L layers with experts, E experts of each.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
import torch
from torch import Tensor

from gradstream.engine.accumulation import Undo
from gradstream.engine.models.flat import is_router
from gradstream.engine.state import EngineState
from gradstream.engine.trained import TrainedModel

_log = structlog.get_logger(__name__)

# What a parameter's name may end in after the name of its module.
_PARTS = frozenset({"weight", "bias", "a", "b"})
_DIGITS = 4


def _is_logged() -> bool:
    return logging.getLogger(__name__).isEnabledFor(logging.DEBUG)


@torch.no_grad()
def log_gradient_norms(state: EngineState, model: TrainedModel, grad: Tensor, *, before: Undo | None = None) -> None:
    """The event gradient_norms of a job's gradient, flat in the model's layout: the 2-norm of all of it and of each kind of layer.

    before: what grad was ahead of the job, where the job added to it. Rank 0 tells it, since every rank has the same gradient.
    """
    if not (state.config.log_gradient_norms and state.comm.is_leader and _is_logged()):
        return
    tensors = model.layout.tensors
    # Float64 holds the squares of every float32.
    parts = (
        tensor.view(grad) if before is None else before.change(grad, tensor.start, tensor.stop) for tensor in tensors
    )
    norms = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts])
    squares: dict[str, float] = {}
    for tensor, norm in zip(tensors, norms.tolist(), strict=True):
        kind = kind_of(tensor.name)
        squares[kind] = squares.get(kind, 0.0) + norm**2
    by_kind = {kind: square**0.5 for kind, square in sorted(squares.items())}
    _log.debug("gradient_norms", model_id=model.model_id, total=sum(squares.values()) ** 0.5, norms=by_kind)


def kind_of(name: str) -> str:
    """The kind of layer of a parameter: embed, lm_head, norm, router, or its module's own name, as q_proj."""
    if is_router(name):
        return "router"
    parts = name.split(".")
    module = parts[-2] if parts[-1] in _PARTS else parts[-1]
    if module == "embed_tokens":
        return "embed"
    return "norm" if module.endswith("norm") or "layernorm" in module else module


@contextmanager
def logging_router_loads(state: EngineState) -> Iterator[None]:
    """The event router_loads of the forward passes in the block, on each rank of those that it ran."""
    loads = state.base.loads
    if loads is None or not _is_logged():
        yield
        return
    with loads.recording() as counts:
        yield
    if counts:
        _log.debug("router_loads", **describe_loads(counts))


def describe_loads(counts: Mapping[str, Tensor]) -> dict[str, object]:
    """fractions: of all tokens' choices, those of each expert, [E]. For each layer, [L]: entropy of its fractions, in nats, log E
    where all experts have as much to do; max_load: what the busiest one has over the mean.

    counts: choices of each expert, int64 [E], by layer; all layers have as many experts.
    """
    counts_LE = torch.stack(list(counts.values())).double().cpu()
    fractions_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
    entropy_L = -torch.special.xlogy(fractions_LE, fractions_LE).sum(dim=1)
    max_load_L = fractions_LE.amax(dim=1) * counts_LE.shape[1]
    return {
        "choices": int(counts_LE.sum()),
        "fractions": _rounded(counts_LE.sum(dim=0) / counts_LE.sum()),
        "entropy": _rounded(entropy_L),
        "max_load": _rounded(max_load_L),
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DIGITS) for value in values.tolist()]
