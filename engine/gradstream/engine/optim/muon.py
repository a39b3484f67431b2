"""Muon (K. Jordan 2024): the momentum of each matrix, made nearly orthogonal, is the direction it moves in; the rest learns by AdamW.

A matrix moves at muon_lr times the schedule's multiplier, scaled by `muon_adjust_lr_fn`, whatever rate a step brings: the two kinds of
rates differ by orders of magnitude. If the optimizer was given a base learning_rate, the step's rate over that base multiplies
muon_lr, so that a client that lowers its rate lowers both. Weight decay is decoupled, at the unscaled rate.

Shape letters: B matrices of one parameter (1, or the experts of a layer), M rows, N columns.
"""

from collections.abc import Iterator
from functools import partial
from math import prod, sqrt

import torch
from torch import Tensor

from gradstream.engine.optim._adam import adam_parts, adam_update
from gradstream.engine.optim._base import OPTIMIZERS, STATE_DTYPES, Change, Optimizer, Piece, StatePart, Step
from gradstream.engine.optim._elements import WEIGHTS, element_pieces, numbers_at_a_time, stored
from gradstream.engine.trained import ParamTensor, TrainedLayout
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.wire import OptimizerSpec

_MOMENTUM = "momentum"
# Of the quintic x -> a x + b x^3 + c x^5, which maps [0, 1.21] into itself and small singular values towards 1 quickly.
_COEFFICIENTS = (3.4445, -4.775, 2.0315)
# Frobenius norm below which a matrix is not scaled up to norm 1, so that a gradient of zero stays zero.
_EPS = 1e-7
# No smaller number has a quotient with _EPS that float32 can hold.
_TINY = 1e-30
# Above any singular value, and so any entry, that the quintic gives, rounding included.
_MAX_ENTRY = 2.0
_MAX_STEPS = 100


def _check(spec: OptimizerSpec) -> None:
    # nan fails every comparison.
    if not 0 < spec.muon_lr < float("inf"):
        raise InvalidRequest(f"optimizer.muon_lr: {spec.muon_lr} must be a finite number above 0")
    if not 0 <= spec.muon_momentum < 1:
        raise InvalidRequest(f"optimizer.muon_momentum: {spec.muon_momentum} must be at least 0 and below 1")
    if not 1 <= spec.muon_ns_steps <= _MAX_STEPS:
        raise InvalidRequest(f"optimizer.muon_ns_steps: {spec.muon_ns_steps} is not within 1 to {_MAX_STEPS}")
    if spec.learning_rate is not None and not 0 < spec.learning_rate < float("inf"):
        raise InvalidRequest(f"optimizer.learning_rate: {spec.learning_rate} must be a finite number above 0")


def _parts(spec: OptimizerSpec, layout: TrainedLayout, _: torch.dtype) -> list[StatePart]:
    """One number for each number of a matrix, two for each of the rest."""
    matrices, rest = _split(layout)
    parts = adam_parts(spec, rest) if rest else []
    if matrices:
        parts.append(StatePart(name=_MOMENTUM, dtype=STATE_DTYPES[spec.dtype], tensors=matrices))
    return parts


def _split(layout: TrainedLayout) -> tuple[list[ParamTensor], list[ParamTensor]]:
    """The matrices, and the rest."""
    return [t for t in layout.tensors if t.is_matrix], [t for t in layout.tensors if not t.is_matrix]


def _pieces(step: Step) -> Iterator[Piece]:
    model = step.model
    matrices, rest = _split(model.layout)
    if rest:
        yield from element_pieces(step, adam_parts(model.optimizer, rest), partial(adam_update, step))
    offset = 0
    for tensor in matrices:
        for place in _places(tensor, numbers_at_a_time(model.weights.device)):
            yield Piece(
                compute=partial(_compute, step, tensor.shape, place, offset),
                is_safe=partial(_is_safe, step, tensor.shape, place, offset),
                numel=place.stop - place.start,
            )
            offset += place.stop - place.start


def _places(tensor: ParamTensor, at_a_time: int) -> Iterator[slice]:
    """As many whole matrices of a tensor at a time as come to at_a_time numbers, one at least."""
    size = prod(tensor.shape[-2:])
    for start in range(tensor.start, tensor.stop, size * max(1, at_a_time // size)):
        yield slice(start, min(start + size * max(1, at_a_time // size), tensor.stop))


def muon_rate(step: Step) -> float:
    """What matrices learn at, before the scaling by their shape."""
    spec = step.model.optimizer
    base = spec.learning_rate
    return spec.muon_lr * (step.multiplier if base is None else step.lr / base)


def _scale(spec: OptimizerSpec, shape: tuple[int, ...]) -> float:
    """What the rate of a matrix is multiplied by."""
    rows, columns = shape[-2:]
    if spec.muon_adjust_lr_fn == "match_rms_adamw":
        # Liu et al. 2025, section 2.2: the root mean square of the update is then that of AdamW's, about 0.2.
        return 0.2 * sqrt(max(rows, columns))
    return sqrt(max(1.0, rows / columns))


def _move(step: Step, place: slice, offset: int) -> tuple[Tensor, Change]:
    """fp32 numbers of the direction before it is made orthogonal, and the change of the momentum."""
    spec = step.model.optimizer
    state = step.model.optim[_MOMENTUM][offset : offset + place.stop - place.start]
    grad = step.grad(place)
    momentum = state.to(torch.float32, copy=True).lerp_(grad, 1 - spec.muon_momentum)
    direction = grad.lerp_(momentum, spec.muon_momentum) if spec.muon_nesterov else momentum
    return direction, stored(step, _MOMENTUM, state, momentum, offset)


def _compute(step: Step, shape: tuple[int, ...], place: slice, offset: int) -> list[Change]:
    model, spec = step.model, step.model.optimizer
    direction, momentum = _move(step, place, offset)
    # Products in bf16 are ten times faster on GPUs; the iteration, which ends far from exact anyway, does not need more.
    dtype = torch.float32 if direction.device.type == "cpu" else torch.bfloat16
    direction_BMN = orthogonalized(direction.view(-1, *shape[-2:]), num_steps=spec.muon_ns_steps, dtype=dtype)
    target = model.weights[place]
    rate = muon_rate(step)
    weights = target.to(torch.float32, copy=True).mul_(1 - rate * step.adam.weight_decay)
    weights.add_(direction_BMN.reshape(-1), alpha=-rate * _scale(spec, shape))
    return [stored(step, WEIGHTS, target, weights, place.start), momentum]


def _is_safe(step: Step, shape: tuple[int, ...], place: slice, offset: int) -> Tensor:
    """Without the matrix products: the momentum is finite, and the weights stay so if they move by no more than is possible."""
    model = step.model
    direction, momentum = _move(step, place, offset)
    rate = muon_rate(step)
    moved = rate * _scale(model.optimizer, shape) * _MAX_ENTRY
    largest = model.weights[place].abs().amax().double() * abs(1 - rate * step.adam.weight_decay) + moved
    is_finite = momentum.value.isfinite().all() & direction.isfinite().all()
    # bf16 ends a little earlier than float32; no weight that trains comes near either.
    return is_finite & (largest < torch.finfo(torch.bfloat16).max / 2)


def orthogonalized(matrices_BMN: Tensor, *, num_steps: int, dtype: torch.dtype) -> Tensor:
    """Each fp32 matrix U S V^T as about U V^T: its singular values near 1 (0.7 to 1.2 after five steps, small ones less).

    Newton-Schulz iteration, Jordan 2024. dtype: of the products. Entries may be anything finite: they are scaled by the largest first,
    so that no square overflows.
    """
    a, b, c = _COEFFICIENTS
    largest_B11 = matrices_BMN.abs().amax(dim=(1, 2), keepdim=True).clamp(min=_TINY)
    x_BMN = matrices_BMN / largest_B11
    norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(1, 2), keepdim=True)
    x_BMN /= torch.maximum(norm_B11, _EPS / largest_B11)
    x_BMN = x_BMN.to(dtype)
    is_tall = x_BMN.shape[1] > x_BMN.shape[2]
    if is_tall:
        x_BMN = x_BMN.mT.contiguous()
    for _ in range(num_steps):
        gram_BMM = x_BMN @ x_BMN.mT
        gram_BMM = torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c)
        x_BMN = torch.baddbmm(x_BMN, gram_BMM, x_BMN, beta=a)
    return (x_BMN.mT if is_tall else x_BMN).float()


OPTIMIZERS.register("muon")(
    Optimizer(
        fields=frozenset(
            {"learning_rate", "muon_lr", "muon_momentum", "muon_nesterov", "muon_ns_steps", "muon_adjust_lr_fn"}
        ),
        check=_check,
        parts=_parts,
        pieces=_pieces,
    )
)
