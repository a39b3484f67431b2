"""What an optimizer is, the work of one update, and the table of optimizers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradstream.engine.optim._rounding import Noise
from gradstream.engine.registry import Registry
from gradstream.engine.trained import ParamTensor, TrainedLayout, TrainedModel
from gradstream.shared.wire import AdamParams, OptimizerSpec

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePart:
    """One tensor of an optimizer's state: flat, the values of `tensors` one after the other, without gaps, in their order."""

    name: str
    dtype: torch.dtype
    tensors: Sequence[ParamTensor]

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One update that is to be made.

    adam: the client's hyper-parameters. multiplier: of the learning rate, by the schedule. number: of this update, from 1. divisor: what
    the accumulated gradient is divided by, 1 for a sum; grad_norm: the L2 norm of the quotient; clip: what the quotient is multiplied
    by, 1 if its norm is within bounds.
    """

    model: TrainedModel
    adam: AdamParams
    multiplier: float
    number: int
    divisor: int
    grad_norm: float
    clip: float
    noise: Noise

    @property
    def age(self) -> int:
        """The number of this update, from 1, since the optimizer's state began."""
        return self.number - self.model.optim_began

    @property
    def lr(self) -> float:
        """The learning rate in force."""
        return self.adam.learning_rate * self.multiplier

    def grad(self, part: slice) -> Tensor:
        """fp32 copy of these values of the gradient as it enters the update."""
        grad = self.model.grad[part].clone()
        if self.divisor != 1:
            grad /= self.divisor
        if self.clip != 1.0:
            grad *= self.clip
        return grad


class Change(NamedTuple):
    """target: values of the weights or of the state, a view. value: what they are to be, in the target's dtype; its own memory."""

    target: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some of an update; the pieces of one touch different values.

    compute: what changes; it stores nothing, and gives the same bits each time until its own changes are stored. is_safe: a bool
    tensor, true if the changes are known to be finite without being computed; None to compute and look at them. numel: numbers of the
    weights that it changes, by which the pieces with is_safe are compared.
    """

    compute: Callable[[], list[Change]]
    is_safe: Callable[[], Tensor] | None = None
    numel: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """fields: those of OptimizerSpec, besides type and dtype, that it goes by. check: their combination; raises InvalidRequest.

    parts: the state that a model of this layout needs, its weights being of that dtype; a pure function of its arguments.
    pieces: the work of an update, all of it in bounded memory if one piece is computed after the other.
    """

    fields: frozenset[str]
    check: Callable[[OptimizerSpec], None]
    parts: Callable[[OptimizerSpec, TrainedLayout, torch.dtype], list[StatePart]]
    pieces: Callable[[Step], Iterator[Piece]]


OPTIMIZERS: Registry[str, Optimizer] = Registry("optimizer")
