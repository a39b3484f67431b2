"""Stochastic gradient descent with momentum as torch.optim.SGD does it: weight decay is part of the gradient.

Of a step's hyper-parameters it goes by learning_rate, weight_decay and grad_clip_norm; beta1, beta2 and eps belong to Adam.
"""

from collections.abc import Iterator
from functools import partial

import torch

from gradstream.engine.optim._base import OPTIMIZERS, STATE_DTYPES, Optimizer, Piece, StatePart, Step
from gradstream.engine.optim._elements import Values, element_pieces
from gradstream.engine.trained import TrainedLayout
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import OptimizerSpec

_MOMENTUM = "momentum"


def _check(spec: OptimizerSpec) -> None:
    if not 0 <= spec.momentum < 1:
        raise InvalidRequest(f"optimizer.momentum: {spec.momentum} must be at least 0 and below 1")
    if not 0 <= spec.dampening <= 1:
        raise InvalidRequest(f"optimizer.dampening: {spec.dampening} must be within 0 to 1")
    if spec.nesterov and (spec.momentum == 0 or spec.dampening != 0):
        raise InvalidRequest(
            f"optimizer.nesterov: it needs a momentum above 0 and dampening 0; they are {spec.momentum} and {spec.dampening}"
        )


def _parts(spec: OptimizerSpec, layout: TrainedLayout, _: torch.dtype) -> list[StatePart]:
    """Nothing without momentum."""
    if spec.momentum == 0:
        return []
    return [StatePart(name=_MOMENTUM, dtype=STATE_DTYPES[spec.dtype], tensors=layout.tensors)]


def _pieces(step: Step) -> Iterator[Piece]:
    model = step.model
    parts = _parts(model.optimizer, model.layout, model.weights.dtype)
    return element_pieces(step, parts, partial(_update, step))


def _update(step: Step, values: Values) -> None:
    spec, direction = step.model.optimizer, values.grad
    if step.adam.weight_decay:
        direction = direction.add(values.weights, alpha=step.adam.weight_decay)
    if spec.momentum:
        momentum = values.state[_MOMENTUM]
        # As in torch, the first gradient is not dampened.
        damping = 0.0 if step.age == 1 else spec.dampening
        momentum.mul_(spec.momentum).add_(direction, alpha=1 - damping)
        direction = direction.add(momentum, alpha=spec.momentum) if spec.nesterov else momentum
    values.weights.add_(direction, alpha=-step.lr)


OPTIMIZERS.register("sgd")(
    Optimizer(
        fields=frozenset({"momentum", "dampening", "nesterov"}),
        check=_check,
        parts=_parts,
        pieces=_pieces,
    )
)
