"""Expert routers whose logits are computed in float32."""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class _Float32View:
    """A module whose parameters read as float32; everything else is the module's own."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 (whatever the module has)
        value = getattr(self._module, name)
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def routers(causal_lm: nn.Module) -> list[nn.Module]:
    """The modules that choose experts, by the name that transformers gives their classes."""
    return [module for module in causal_lm.modules() if type(module).__name__.endswith("Router")]


def compute_in_float32(causal_lm: nn.Module) -> int:
    """Make every router run its own forward on float32 hidden states and weights; returns how many there were.

    The logits are then not rounded to the compute dtype before the softmax, and neither are the weights of the chosen experts.
    """
    found = routers(causal_lm)
    for router in found:
        router.forward = MethodType(_forward(type(router).forward), router)
    return len(found)


def _forward(original: Callable[..., Any]) -> Callable[..., Any]:  # Any: each family has its own result
    def forward(self: nn.Module, hidden_states: Tensor, *args: object, **kwargs: object) -> Any:  # noqa: ANN401 (as above)
        return original(_Float32View(self), hidden_states.to(torch.float32), *args, **kwargs)

    return forward
