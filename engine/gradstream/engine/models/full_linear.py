"""Linear layers whose weights are trained, by the engine's own products.

Legend: T tokens, I in features, O out features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradstream.engine.products import library, linear, mm


class FullLinear(nn.Module):
    """In the place of an nn.Linear, with its parameters."""

    bias: nn.Parameter | None

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        return trained_linear(x, self.weight, self.bias)


def trained_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., O], with gradients of all three."""
    if library(weight_OI.device, weight_OI.dtype) == "torch":
        return F.linear(x, weight_OI, bias_O)
    out: Tensor = _Linear.apply(x, weight_OI, bias_O)  # type: ignore[no-untyped-call]  # torch's
    return out


class _Linear(torch.autograd.Function):
    """See trained_linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:  # noqa: ANN401 (torch makes ctx)
        x_TI = x.flatten(0, -2)
        ctx.save_for_backward(x_TI, weight_OI)
        return linear(x_TI, weight_OI, bias_O).view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401 (as above)
        x_TI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_TO = grad.flatten(0, -2)
        grad_x = mm(grad_TO, weight_OI).view(*grad.shape[:-1], weight_OI.shape[1]) if needs_x else None
        return grad_x, mm(grad_TO.t(), x_TI) if needs_weight else None, grad_TO.sum(0) if needs_bias else None
