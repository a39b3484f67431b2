"""Gradients added to a model's accumulator, or refused as a whole.

Legend: P parameters of a model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstream.engine.finite import fits
from gradstream.engine.trained import TrainedModel
from gradstream.shared.errors import NonFinite

# Values that are looked at together: what a check allocates stays small beside a model.
_CHUNK = 1 << 24
# Of a copy in host memory. A power of two: torch takes pinned memory in such pieces only.
_PIECE = 1 << 26


class Undo:
    """A flat gradient [P] as it was, in host memory: there is often no room for another of this size on the device.

    Copies go in the order of the device's stream, so nothing waits for them but what reads them.
    """

    def __init__(self, grad: Tensor) -> None:
        self._pieces: list[Tensor] = []
        for part in torch.split(grad, _PIECE):
            piece = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._pieces.append(piece.copy_(part, non_blocking=True))

    def restore(self, grad: Tensor) -> None:
        """Make grad what it was, bit by bit."""
        for part, piece in zip(torch.split(grad, _PIECE), self._pieces, strict=True):
            part.copy_(piece, non_blocking=True)

    def change(self, grad: Tensor, start: int, stop: int) -> Tensor:
        """What was added since to the values [start, stop) of grad, up to rounding."""
        change = grad[start:stop].clone()
        for number in range(start // _PIECE, -(-stop // _PIECE)):
            first = number * _PIECE
            low, high = max(start, first), min(stop, first + _PIECE)
            before = self._pieces[number][low - first : high - first]
            change[low - start : high - start] -= before.to(grad.device, non_blocking=True)
        return change


@torch.no_grad()
def are_finite_sums(sums: Sequence[tuple[TrainedModel, Tensor]]) -> list[Tensor]:
    """For each model and gradient a bool tensor, at which nobody has looked yet: whether `accumulate` will take it."""
    if not sums:
        return []
    extremes = [_extremes(grad, None if grad is model.grad else model.grad) for model, grad in sums]
    is_finite = torch.stack([end for own in extremes for end in own]).isfinite()
    return [own.all() for own in torch.split(is_finite, [len(own) for own in extremes])]


def is_finite_sum(model: TrainedModel, grad: Tensor) -> Tensor:
    """A bool tensor, at which nobody has looked yet: whether `accumulate` will take this gradient [P] of the model."""
    return are_finite_sums([(model, grad)])[0]


@torch.no_grad()
def accumulate(model: TrainedModel, grad: Tensor, *, num_valid: int, is_finite: bool | None = None) -> None:
    """Add a job's gradient, flat fp32 [P]; model.grad itself, where it was added there already.

    num_valid: the job's tokens with a target. is_finite: whether the sum is, where that is known. Raises NonFinite, with the model as it
    was (but for such a shared grad), when a sum would not be finite.
    """
    is_shared = grad is model.grad
    if is_finite is None:
        is_finite = bool(is_finite_sum(model, grad))
    if not is_finite:
        is_sum = model.has_grad if is_shared else bool(fits(grad, grad.dtype))
        what = "accumulated gradient" if is_sum else "gradient"
        raise NonFinite(f"the {what} of model {model.model_id} holds nan or inf; nothing was accumulated")
    if not is_shared:
        model.grad.add_(grad)
    model.has_grad = True
    model.valid_tokens += num_valid


def _extremes(grad: Tensor, base: Tensor | None) -> list[Tensor]:
    """Some values of grad, or of its sum with base, which are finite if all are."""
    extremes: list[Tensor] = []
    for start in range(0, grad.numel(), _CHUNK):
        part = grad[start : start + _CHUNK]
        # nan where a number is.
        extremes += torch.aminmax(part if base is None else part + base[start : start + _CHUNK])
    return extremes
