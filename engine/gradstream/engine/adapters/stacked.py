"""Adapters of one shape that follow one another in a row: their low-rank products as one batched or one grouped product.

Legend: A adapters, T tokens of all of them, N tokens of each where all have as many, else the most of one, I in features, O out features,
R rank, P parameters of one adapter.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from gradstream.engine.adapters.layout import LoraPair
from gradstream.engine.padding import Padding
from gradstream.engine.products import add_bmm_, bmm


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedPatch:
    """Adapters at one site, one after the other on tokens [start, end). The same products as those of a `Patch` for each of them.

    ends_A: int32, where each adapter's tokens end, counted from start, for grouped products; padding: for batched products of unequally
    many tokens; both None where all have equally many. scale: alpha / rank of each, as the low-rank activations take it: [A, 1, 1], [A, N,
    1] with padding, 0 for what pads, or [T, 1] with ends_A, in float32 or wider. weight: a [A, R, I] and b [A, O, R] in the compute dtype.
    grad: the same of the trained ranks, views into the adapters' own buffers, which are added to. frozen_rank, column: see Patch.
    """

    start: int
    end: int
    ends_A: Tensor | None
    padding: Padding | None
    scale: Tensor
    weight: LoraPair
    grad: LoraPair | None
    frozen_rank: int = 0
    column: int = 0

    def add(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """Add the change to this patch's tokens and columns of y; returns scale * x a^T, [A, N, R] or [T, R]."""
        low = self._times(self._shaped(x_TI), self.weight.a.transpose(1, 2)).mul_(self.scale)
        self._add_to(self._columns(y_TO), low, self.weight.b.transpose(1, 2))
        return low

    def backward(self, *, grad_TO: Tensor, x_TI: Tensor, low: Tensor, grad_x_TI: Tensor | None) -> None:
        """Add the gradients of the trained ranks to their buffers, and that of x to grad_x_TI. low: what `add` returned."""
        grad = self._shaped(self._columns(grad_TO))
        # What pads has a scale of 0: it adds nothing to any gradient.
        grad_low = self._times(grad, self.weight.b).mul_(self.scale)
        if self.grad is not None:
            trained = slice(self.frozen_rank, None)
            self._add_product(self.grad.a, grad_low[..., trained], self._shaped(x_TI))
            self._add_product(self.grad.b, grad, low[..., trained])
        if grad_x_TI is not None:
            self._add_to(grad_x_TI, grad_low, self.weight.a)

    def _columns(self, y_TO: Tensor) -> Tensor:
        size = self.weight.b.shape[1]
        return y_TO if y_TO.shape[1] == size else y_TO.narrow(1, self.column, size)

    def _shaped(self, x_TI: Tensor) -> Tensor:
        """This patch's tokens: [A, N, I], or [T, I] with ends_A."""
        part_TI = x_TI[self.start : self.end]
        if self.padding is not None:
            return self.padding.spread(part_TI)
        return part_TI if self.ends_A is not None else part_TI.view(len(self.weight.a), -1, part_TI.shape[1])

    def _add_to(self, y_TO: Tensor, left: Tensor, right: Tensor) -> None:
        """Add each adapter's rows of left times its matrix to this patch's tokens of y."""
        if self.padding is not None:
            y_TO[self.start : self.end].add_(self.padding.collect(bmm(left, right)))
        elif self.ends_A is not None:
            y_TO[self.start : self.end].add_(F.grouped_mm(left, right, offs=self.ends_A))
        else:
            self._shaped(y_TO).baddbmm_(left, right)

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        """Each adapter's rows of left times its matrix."""
        return bmm(left, right) if self.ends_A is None else F.grouped_mm(left, right, offs=self.ends_A)

    def _add_product(self, target: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left^T right over each adapter's tokens to its part of target [A, ., .]."""
        if self.ends_A is None:
            add_bmm_(target, left.transpose(1, 2), right)
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
