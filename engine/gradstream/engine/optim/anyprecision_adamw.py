"""AdamW whose bf16 weights keep, beside them, what their rounding lost (Kahan 1965; Zamirai et al. 2021, section 3.2).

Where the weights are fp32 nothing is lost, so it is AdamW. Where they are bf16 a `compensation` tensor of the same dtype holds the rest:
together they have about 16 bits of mantissa. kahan false drops it, and the weights are rounded stochastically.
"""

from collections.abc import Iterator
from functools import partial

import torch

from gradstream.engine.optim._adam import adam_parts, adam_update
from gradstream.engine.optim._base import OPTIMIZERS, Optimizer, Piece, StatePart, Step
from gradstream.engine.optim._elements import COMPENSATION, element_pieces
from gradstream.engine.trained import TrainedLayout
from gradstream.shared.wire import OptimizerSpec


def _check(_: OptimizerSpec) -> None:
    """All combinations are possible."""


def _parts(spec: OptimizerSpec, layout: TrainedLayout, weights_dtype: torch.dtype) -> list[StatePart]:
    parts = adam_parts(spec, list(layout.tensors))
    if spec.kahan and weights_dtype == torch.bfloat16:
        parts.append(StatePart(name=COMPENSATION, dtype=weights_dtype, tensors=layout.tensors))
    return parts


def _pieces(step: Step) -> Iterator[Piece]:
    model = step.model
    parts = _parts(model.optimizer, model.layout, model.weights.dtype)
    return element_pieces(step, parts, partial(adam_update, step))


OPTIMIZERS.register("anyprecision_adamw")(
    Optimizer(fields=frozenset({"kahan"}), check=_check, parts=_parts, pieces=_pieces)
)
