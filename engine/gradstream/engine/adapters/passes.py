"""Which adapter serves which tokens in one forward (and backward) pass.

Legend: T tokens of the row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.layout import LoraPair


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSlice:
    """Tokens [start, end) of the row with one adapter; weights None is the bare base model.

    grad: flat fp32 in weights.layout; the backward pass adds this slice's gradient to it. None: not trained in this pass.
    """

    start: int
    end: int
    weights: LoraWeights | None
    grad: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Patch:
    """One slice at one site: its factors in the compute dtype and where their gradients are added.

    frozen_rank: how many of the weight's ranks, the first ones, get no gradient; grad has the others. column: where the site's columns
    begin in a product that is computed for several sites at once.
    """

    start: int
    end: int
    scale: float
    weight: LoraPair
    grad: LoraPair | None
    frozen_rank: int = 0
    column: int = 0

    def of(self, y_TO: Tensor) -> Tensor:
        """This patch's tokens and columns of a product, as a view."""
        part_TO = y_TO[self.start : self.end]
        size = self.weight.b.shape[-2]
        return part_TO if part_TO.shape[1] == size else part_TO.narrow(1, self.column, size)


class AdapterPass:
    """The slices of one row. Slices are disjoint and in order; tokens outside all of them run on the bare base model."""

    def __init__(self, slices: Sequence[AdapterSlice], *, compute_dtype: torch.dtype) -> None:
        self.slices = list(slices)
        self.is_training = any(part.grad is not None for part in self.slices)
        # Connects every LoRA function to the graph; the gradients themselves go into the slices' buffers.
        self.anchor = torch.zeros((), requires_grad=True)
        self._patches: dict[int, list[Patch]] = {}
        for part in self.slices:
            if part.weights is not None:
                self._add(part, part.weights, compute_dtype)

    @classmethod
    def inference(
        cls, slices: Sequence[tuple[int, int, LoraWeights | None]], *, compute_dtype: torch.dtype
    ) -> "AdapterPass":
        """A pass that trains nothing, from (start, end, weights)."""
        parts = [AdapterSlice(start=start, end=end, weights=weights) for start, end, weights in slices]
        return cls(parts, compute_dtype=compute_dtype)

    def patches(self, site: int) -> list[Patch]:
        """The slices that change a site, in token order."""
        return self._patches.get(site, _NONE)

    def _add(self, part: AdapterSlice, weights: LoraWeights, compute_dtype: torch.dtype) -> None:
        factors = weights.factors
        grads = weights.layout.pairs(part.grad) if part.grad is not None else None
        for site, pair in factors.pairs_in(compute_dtype).items():
            grad = grads[site] if grads is not None else None
            patch = Patch(part.start, part.end, weights.scale, pair, grad, factors.frozen_rank)
            self._patches.setdefault(site, []).append(patch)


_NONE: list[Patch] = []
