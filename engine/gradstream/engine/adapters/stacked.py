"""Adapters of one shape that follow one another in a row: their low-rank products as one batched or one grouped product.

Legend: A adapters, T tokens of all of them, N tokens of each where all have as many, I in features, O out features, R rank, P parameters of
one adapter.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gradstream.engine.adapters.layout import LoraPair
from gradstream.engine.products import add_bmm_, bmm, is_narrow


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedPatch:
    """Adapters at one site, one after the other on tokens [start, end). The same products as those of a `Patch` for each of them.

    ends_A: int32, where each adapter's tokens end, counted from start; None where all have equally many. scale: alpha / rank of each,
    as the low-rank activations take it: [A, 1, 1], or [T, 1] with ends_A, in float32 or wider. weight: a [A, R, I] and b [A, O, R] in the compute dtype.
    grad: the same of the trained ranks, views into the adapters' own buffers, which are added to. frozen_rank, column: see Patch.
    """

    start: int
    end: int
    ends_A: Tensor | None
    scale: Tensor
    weight: LoraPair
    grad: LoraPair | None
    frozen_rank: int = 0
    column: int = 0

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """Add the change to this patch's tokens and columns of y; returns scale * x a^T, [A, N, R] or [T, R]."""
        low = self._times(self._x(x_TI), self.weight.a.transpose(1, 2)).mul_(self.scale)
        y = self._part(y_TO)
        if self.ends_A is None:
            y.baddbmm_(low, self.weight.b.transpose(1, 2))
        else:
            y += self._times(low, self.weight.b.transpose(1, 2))
        return low

    def backward(self, *, grad_TO: Tensor, x_TI: Tensor, low: Tensor, grad_x_TI: Tensor | None) -> None:
        """Add the gradients of the trained ranks to their buffers, and that of x to grad_x_TI. low: what `add` returned."""
        grad = self._part(grad_TO)
        grad_low = self._times(grad, self.weight.b).mul_(self.scale)
        if self.grad is not None:
            trained = slice(self.frozen_rank, None)
            self._add_product(self.grad.a, grad_low[..., trained], self._x(x_TI))
            self._add_product(self.grad.b, grad, low[..., trained])
        if grad_x_TI is None:
            return
        grad_x = self._x(grad_x_TI)
        if self.ends_A is None:
            grad_x.baddbmm_(grad_low, self.weight.a)
        else:
            grad_x += self._times(grad_low, self.weight.a)

    def _x(self, x_TI: Tensor) -> Tensor:
        """This patch's tokens: [A, N, I], or [T, I] with ends_A."""
        part_TI = x_TI[self.start : self.end]
        return part_TI if self.ends_A is not None else part_TI.view(len(self.weight.a), -1, part_TI.shape[1])

    def _part(self, y_TO: Tensor) -> Tensor:
        """This patch's tokens and columns, shaped as in `_x`."""
        size = self.weight.b.shape[1]
        return self._x(y_TO if y_TO.shape[1] == size else y_TO.narrow(1, self.column, size))

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        """Each adapter's rows of left times its matrix."""
        if self.ends_A is None:
            return bmm(left, right)
        if is_narrow(left, right):
            return F.grouped_mm(right.transpose(1, 2), left.t(), offs=self.ends_A).t()
        return F.grouped_mm(left, right, offs=self.ends_A)

    def _add_product(self, target: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left^T right over each adapter's tokens to its part of target [A, ., .]."""
        if self.ends_A is None:
            add_bmm_(target, left.transpose(1, 2), right)
        elif is_narrow(left, right):
            target.add_(F.grouped_mm(right.t(), left, offs=self.ends_A).transpose(1, 2))
        else:
            target.add_(F.grouped_mm(left.t(), right, offs=self.ends_A))


def side_by_side(tensors: list[Tensor]) -> Tensor | None:
    """The flat tensors, all of one size [P], as a view [A, P] where they lie in one memory at equal distances; else None."""
    first = tensors[0]
    if len(tensors) == 1:
        return first[None]
    step = tensors[1].storage_offset() - first.storage_offset()
    place = first.untyped_storage().data_ptr()
    for number, tensor in enumerate(tensors):
        is_there = tensor.storage_offset() == first.storage_offset() + number * step
        if not is_there or tensor.untyped_storage().data_ptr() != place or not tensor.is_contiguous():
            return None
    if step < first.numel():
        return None
    return first.as_strided((len(tensors), first.numel()), (step, 1))
