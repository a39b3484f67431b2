"""Updates that treat each number for itself, a stretch of the flat tensors at a time, computed in fp32 whatever is stored."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradstream.engine.optim._base import Change, Piece, StatePart, Step
from gradstream.engine.optim._rounding import rounded

# Numbers of one piece: in the caches of a CPU, and enough to fill a GPU. Multiples of any vector width, so that bits do not depend on them.
_CPU_NUMBERS = 1 << 18
_GPU_NUMBERS = 1 << 24

WEIGHTS = "weights"
# State of the weights themselves: what was lost when they were rounded to bf16.
COMPENSATION = "compensation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A stretch in fp32, as copies. state: by name, without the compensation, which is in the weights."""

    weights: Tensor
    grad: Tensor
    state: dict[str, Tensor]


# Changes weights and state in place.
Update = Callable[[Values], None]


def numbers_at_a_time(device: torch.device) -> int:
    """How many numbers a piece works on."""
    return _CPU_NUMBERS if device.type == "cpu" else _GPU_NUMBERS


def element_pieces(step: Step, parts: Sequence[StatePart], update: Update) -> Iterator[Piece]:
    """The pieces of an update of the tensors that the parts cover, which are the same for all parts; of all tensors without parts."""
    tensors = parts[0].tensors if parts else step.model.layout.tensors
    names = [part.name for part in parts]
    at_a_time = numbers_at_a_time(step.model.weights.device)
    offset = 0
    for start, stop in _runs([(tensor.start, tensor.stop) for tensor in tensors]):
        for first in range(start, stop, at_a_time):
            last = min(first + at_a_time, stop)
            yield Piece(compute=partial(_compute, step, slice(first, last), offset, names, update))
            offset += last - first


def _runs(places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours joined."""
    runs: list[tuple[int, int]] = []
    for start, stop in places:
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((start, stop))
    return runs


def _compute(step: Step, place: slice, offset: int, names: Sequence[str], update: Update) -> list[Change]:
    """The changes of the weights at place, and of the state that begins at offset."""
    model = step.model
    own = slice(offset, offset + place.stop - place.start)
    weights = model.weights[place]
    state = {name: model.optim[name][own] for name in names}
    values = Values(
        weights=weights.to(torch.float32, copy=True),
        grad=step.grad(place),
        state={name: view.to(torch.float32, copy=True) for name, view in state.items() if name != COMPENSATION},
    )
    if COMPENSATION in state:
        values.weights.add_(state[COMPENSATION])
    update(values)
    changes = [stored(step, name, state[name], value, offset) for name, value in values.state.items()]
    if COMPENSATION not in state:
        return [stored(step, WEIGHTS, weights, values.weights, place.start), *changes]
    nearest = rounded(values.weights, weights.dtype)
    lost = values.weights - nearest
    return [Change(weights, nearest), stored(step, COMPENSATION, state[COMPENSATION], lost, offset), *changes]


def stored(step: Step, name: str, target: Tensor, values: Tensor, start: int) -> Change:
    """The change of a target, which begins at start of tensor `name`, to fp32 values."""
    if target.dtype == torch.float32:
        return Change(target, values)
    noise = step.noise.bits(name, start, values.numel(), device=values.device)
    return Change(target, rounded(values, target.dtype, noise))
