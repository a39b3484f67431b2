"""AdamW with decoupled weight decay."""

from collections.abc import Iterator
from functools import partial

import torch

from gradstream.engine.optim._adam import adam_parts, adam_update
from gradstream.engine.optim._base import OPTIMIZERS, Optimizer, Piece, StatePart, Step
from gradstream.engine.optim._elements import element_pieces
from gradstream.engine.trained import TrainedLayout
from gradstream.shared.wire import OptimizerSpec


def _check(_: OptimizerSpec) -> None:
    """Type and dtype always go together."""


def _parts(spec: OptimizerSpec, layout: TrainedLayout, _: torch.dtype) -> list[StatePart]:
    return adam_parts(spec, list(layout.tensors))


def _pieces(step: Step) -> Iterator[Piece]:
    model = step.model
    parts = _parts(model.optimizer, model.layout, model.weights.dtype)
    return element_pieces(step, parts, partial(adam_update, step))


OPTIMIZERS.register("adamw")(Optimizer(fields=frozenset(), check=_check, parts=_parts, pieces=_pieces))
