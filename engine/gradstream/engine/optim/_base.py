"""What an optimizer is, and the table of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gradstream.engine.registry import Registry
from gradstream.engine.trained import ParamTensor, TrainedLayout
from gradstream.shared.wire import OptimizerSpec

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
class Optimizer:
    """parts: the state that a model of this layout needs, weights being of that dtype; a pure function of its arguments."""

    parts: Callable[[OptimizerSpec, TrainedLayout, torch.dtype], list[StatePart]]


OPTIMIZERS: Registry[str, Optimizer] = Registry("optimizer")
