"""One update of one model: the gradient's norm, clipping, the optimizer's work, and all of it or nothing."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from gradstream.engine.finite import fits
from gradstream.engine.optim._base import OPTIMIZERS, Change, Piece, Step
from gradstream.engine.optim._elements import numbers_at_a_time
from gradstream.engine.optim._rounding import Noise
from gradstream.engine.optim.schedule import Schedule
from gradstream.engine.trained import TrainedModel
from gradstream.shared.errors import NonFinite
from gradstream.shared.hyperparameters import check_adam
from gradstream.shared.wire import AdamParams

# As in torch.nn.utils.clip_grad_norm_.
_CLIP_EPS = 1e-6
# Of a model up to this many numbers the changes are kept between the two passes; they take 12 to 16 bytes a number.
_KEPT_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """grad_norm: the global L2 norm before clipping, of the gradient that the update is made with. number: of this update, from 1.

    lr: the learning rate in force, after the schedule.
    """

    grad_norm: float
    lr: float
    number: int


@torch.no_grad()
def update(
    model: TrainedModel,
    adam: AdamParams,
    *,
    seed: int,
    schedule: Schedule | None = None,
    compute_dtype: torch.dtype = torch.float32,
    computing: AbstractContextManager[None] | None = None,
) -> StepFacts:
    """Apply the accumulated gradient once, by the model's optimizer, and clear it. seed: the engine's, for rounding.

    Without an accumulated gradient this is a step with gradient zero: moments and weights decay. Of a token_mean model the gradient
    is divided by its valid tokens first. grad_clip_norm 0 means no clipping. compute_dtype: what passes round the weights to. computing:
    entered while nothing is stored yet. Raises InvalidRequest (hyper-parameters), and NonFinite when the norm, an updated value, or a
    weight rounded to compute_dtype is not finite; the model is then as it was.
    """
    check_adam(adam)
    (norm,) = norms([model.grad])
    step = planned(model, adam, norm=norm, seed=seed, schedule=schedule)
    if not _apply(step, compute_dtype, nullcontext() if computing is None else computing):
        raise not_finite(step)
    return finished(step)


def planned(model: TrainedModel, adam: AdamParams, *, norm: float, seed: int, schedule: Schedule | None) -> Step:
    """The model's next update. norm: of what was accumulated. Raises NonFinite when it is nan or inf."""
    divisor = max(1, model.valid_tokens) if model.reduction == "token_mean" else 1
    grad_norm = norm / divisor
    if not math.isfinite(grad_norm):
        raise NonFinite(f"the gradient norm of model {model.model_id} is {grad_norm}; no step was made")
    number = model.step + 1
    return Step(
        model=model,
        adam=adam,
        multiplier=1.0 if schedule is None else schedule.multiplier(number),
        number=number,
        divisor=divisor,
        grad_norm=grad_norm,
        clip=min(1.0, adam.grad_clip_norm / (grad_norm + _CLIP_EPS)) if adam.grad_clip_norm > 0 else 1.0,
        noise=Noise.of(seed=seed, model_id=model.model_id, step=number),
    )


def not_finite(step: Step) -> NonFinite:
    """Why an update was not made."""
    return NonFinite(
        f"step {step.number} of model {step.model.model_id} would make weights or moments nan or inf "
        f"(learning_rate {step.lr}, eps {step.adam.eps}, gradient norm {step.grad_norm:.3g}); no step was made"
    )


def finished(step: Step) -> StepFacts:
    """The model after its update was stored."""
    step.model.step = step.number
    step.model.clear_grad()
    step.model.sync()
    return StepFacts(grad_norm=step.grad_norm, lr=step.lr, number=step.number)


def norms(grads: Sequence[Tensor]) -> list[float]:
    """The L2 norm of each, in float64, a stretch at a time. One look at the device for all."""
    stretches = [torch.split(grad, numbers_at_a_time(grad.device)) for grad in grads]
    parts = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for own in stretches for part in own])
    values = iter(parts.tolist())
    # hypot neither overflows nor loses the only one.
    return [math.hypot(*islice(values, len(own))) for own in stretches]


def _apply(step: Step, compute_dtype: torch.dtype, computing: AbstractContextManager[None]) -> bool:
    """Make the update; False, with nothing changed, when something would not be finite.

    Two passes over the pieces: the first computes and looks, the second computes again and stores. That costs the arithmetic twice, and
    no memory: a copy to go back to would be as large as the model and its state. The second pass gives the bits of the first, since a
    piece reads only what it changes itself. The changes of a small model are kept instead. Matrix products are not made twice: where
    a piece can tell beforehand that its result will be finite, that is enough; then the largest of these is computed once more than
    needed, so that the memory which the second pass takes is asked for while nothing is stored yet.
    """
    pieces = list(OPTIMIZERS[step.model.optimizer.type].pieces(step))
    is_small = step.model.layout.num_params <= _KEPT_NUMBERS
    weights = _place(step.model.weights)
    kept: dict[int, list[Change]] = {}
    verdicts: list[Tensor] = []
    with computing:
        for index, piece in enumerate(pieces):
            if piece.is_safe is not None:
                verdicts.append(piece.is_safe())
                continue
            changes = piece.compute()
            verdicts += [
                fits(value, compute_dtype if _place(target) == weights else value.dtype) for target, value in changes
            ]
            if is_small:
                kept[index] = changes
        if not _all(verdicts):
            return False
        foretold = [index for index, piece in enumerate(pieces) if piece.is_safe is not None]
        if is_small:
            kept |= {index: pieces[index].compute() for index in foretold}
        elif foretold:
            pieces[max(foretold, key=lambda index: pieces[index].numel)].compute()
    _store(pieces, kept)
    return True


def _place(tensor: Tensor) -> int:
    """The same for all views into one tensor."""
    return tensor.untyped_storage().data_ptr()


def _store(pieces: list[Piece], kept: dict[int, list[Change]]) -> None:
    """Write every change, computed again unless it was kept."""
    foretold: list[Tensor] = []
    for index, piece in enumerate(pieces):
        changes = kept.pop(index, None) or piece.compute()
        if piece.is_safe is not None:
            foretold.append(_are_finite(changes))
        for target, value in changes:
            target.copy_(value)
    # Only a fault of the machine or of this program can make it so; the state is then worthless, and the process must end.
    assert _all(foretold), "an update that had to be finite is not"


def _are_finite(changes: list[Change]) -> Tensor:
    return torch.stack([change.value.isfinite().all() for change in changes]).all()


def _all(verdicts: list[Tensor]) -> bool:
    """One look at the device for all of them."""
    return not verdicts or bool(torch.stack(verdicts).all())
