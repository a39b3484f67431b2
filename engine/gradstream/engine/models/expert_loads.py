"""How many tokens each expert gets.

Legend: T tokens, C experts a token goes to, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from gradstream.engine.adapters.modules import AdaptedExperts
from gradstream.engine.models.full_experts import FullExperts

_Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertLoads:
    """Counts for the experts of every layer: of forward passes, and only while `recording`."""

    def __init__(self, causal_lm: nn.Module) -> None:
        """Put a count before the forward of every experts module; call it before these are compiled."""
        self._counts: dict[str, Tensor] | None = None
        self._is_forward = False
        for path, module in causal_lm.named_modules():
            if isinstance(module, AdaptedExperts | FullExperts):
                module.forward = partial(self._count, path, module.gate_up_proj.shape[0], module.forward)  # type: ignore[method-assign]

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Within the block, forward passes add to int64 [E] for each experts module, by its path."""
        assert self._counts is None, "counts are being recorded already"
        counts: dict[str, Tensor] = {}
        self._counts = counts
        try:
            yield counts
        finally:
            self._counts = None

    @contextmanager
    def forward_pass(self) -> Iterator[None]:
        """A forward pass. A layer that runs outside of one is computed again, for a backward pass."""
        self._is_forward = True
        try:
            yield
        finally:
            self._is_forward = False

    def _count(
        self, path: str, num_experts: int, forward: _Forward, hidden_TD: Tensor, index_TC: Tensor, weights_TC: Tensor
    ) -> Tensor:
        if self._counts is not None and self._is_forward:
            counts_E = torch.bincount(index_TC.flatten(), minlength=num_experts)
            before_E = self._counts.get(path)
            self._counts[path] = counts_E if before_E is None else before_E + counts_E
        return forward(hidden_TD, index_TC, weights_TC)
