"""A full-weight model as named tensors: what a checkpoint of it holds, and where that goes in a model."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gradstream.engine.checkpoint.formats._base import MODEL, OPTIM, STEP
from gradstream.engine.models.flat import FullLayout
from gradstream.engine.models.full import FullModel
from gradstream.engine.optim._base import StatePart
from gradstream.engine.optim.state import named_state, state_parts


def parts_of(model: FullModel) -> list[StatePart]:
    """The tensors of the model's optimizer."""
    return state_parts(model.optimizer, model.layout, weights_dtype=model.weights.dtype)


def weights_of(layout: FullLayout, flat: Tensor) -> dict[str, Tensor]:
    """Views of each trained parameter in a flat tensor, under the names of checkpoints."""
    return {f"{MODEL}{name}": view for name, view in layout.named_views(flat).items()}


def state_of(model: FullModel) -> dict[str, Tensor]:
    """Views of each parameter's part of the optimizer's state, under the names of checkpoints."""
    return {f"{OPTIM}{name}": view for name, view in named_state(parts_of(model), model.optim).items()}


def content_of(model: FullModel, frozen: Mapping[str, Tensor], *, has_state: bool) -> dict[str, Tensor]:
    """All of a training checkpoint, without a copy. frozen: the parameters that are not trained, by their names in the model."""
    untrained = {f"{MODEL}{name}": value.detach() for name, value in frozen.items()}
    content = weights_of(model.layout, model.weights.detach()) | untrained
    if has_state:
        content |= state_of(model)
    return content | {STEP: torch.tensor(model.step)}
