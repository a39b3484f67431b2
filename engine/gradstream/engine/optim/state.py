"""An optimizer's tensors: which a model needs, fresh ones, and each parameter's part of them by name."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradstream.engine import optim
from gradstream.engine.optim._base import OPTIMIZERS, Optimizer, StatePart
from gradstream.engine.registry import import_siblings
from gradstream.engine.trained import TrainedLayout
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.hyperparameters import check_optimizer_numbers
from gradstream.shared.wire import OptimizerSpec

import_siblings(optim)


def optimizer_of(spec: OptimizerSpec) -> Optimizer:
    """The implementation of a spec."""
    return OPTIMIZERS[spec.type]


def check_optimizer(spec: OptimizerSpec) -> None:
    """Raise InvalidRequest, naming the field, when one is out of its range, or is set and belongs to another optimizer."""
    optimizer = optimizer_of(spec)
    check_optimizer_numbers(spec, field="optimizer")
    default = OptimizerSpec()
    for name in sorted(set(spec.__struct_fields__) - {"type", "dtype"} - optimizer.fields):
        if getattr(spec, name) != getattr(default, name):
            own = ", ".join(sorted(optimizer.fields)) or "no settings of its own"
            raise InvalidRequest(
                f"optimizer.{name}: {getattr(spec, name)} means nothing to {spec.type}, which has {own}"
            )
    optimizer.check(spec)


def state_parts(
    spec: OptimizerSpec, layout: TrainedLayout, *, weights_dtype: torch.dtype = torch.float32
) -> list[StatePart]:
    """The state of this optimizer for a model of this layout. weights_dtype: of the model's master weights."""
    return optimizer_of(spec).parts(spec, layout, weights_dtype)


def new_state(parts: Iterable[StatePart], *, device: torch.device) -> dict[str, Tensor]:
    """The state before the first step, all zero, by name; each tensor flat [part.numel]."""
    return {part.name: torch.zeros(part.numel, dtype=part.dtype, device=device) for part in parts}


def named_state(parts: Iterable[StatePart], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of each parameter's part of the state, in the parameter's shape, under `{part}.{parameter}`."""
    views: dict[str, Tensor] = {}
    for part in parts:
        sizes = [tensor.numel for tensor in part.tensors]
        for tensor, values in zip(part.tensors, torch.split(state[part.name], sizes), strict=True):
            views[f"{part.name}.{tensor.name}"] = values.view(tensor.shape)
    return views
