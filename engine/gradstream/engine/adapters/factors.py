"""The factors that a forward pass multiplies with: an adapter's trained ones, and before them those that are frozen.

Legend: R rank of all factors, F that of the frozen ones, I in features, O out features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gradstream.engine.adapters.layout import AdapterLayout, LoraPair


@dataclass(frozen=True)
class Factors:
    """All factors of an adapter as one adapter of rank R. weights: flat fp32 in layout.

    frozen_rank: F. Rows :F of each a [R, I] and columns :F of each b [O, R] get no gradient.
    """

    layout: AdapterLayout
    weights: Tensor
    frozen_rank: int = 0

    @classmethod
    def empty(cls, layout: AdapterLayout, *, frozen_rank: int, device: torch.device) -> "Factors":
        """Unwritten ones. layout: of all of them."""
        weights = torch.empty(layout.num_params, dtype=torch.float32, device=device)
        return cls(layout, weights, frozen_rank)

    @cached_property
    def pairs(self) -> dict[int, LoraPair]:
        """Views into the weights, by site index."""
        return self.layout.pairs(self.weights)

    def pairs_in(self, dtype: torch.dtype) -> dict[int, LoraPair]:
        """The factors of each site in a dtype, by site index; the weights themselves where it is theirs."""
        return self.pairs if self.weights.dtype == dtype else self.layout.pairs(self.weights.to(dtype))

    def put(self, pairs: Mapping[int, LoraPair], *, first: int) -> None:
        """Copy factors of each site in, as the ranks from first on."""
        for site, (a, b) in pairs.items():
            own = self.pairs[site]
            own.a.narrow(-2, first, a.shape[-2]).copy_(a)
            own.b.narrow(-1, first, b.shape[-1]).copy_(b)

    def get(self, pairs: Mapping[int, LoraPair], *, first: int) -> None:
        """The inverse of `put`: copy the ranks from first on into factors of each site."""
        for site, (a, b) in pairs.items():
            own = self.pairs[site]
            a.copy_(own.a.narrow(-2, first, a.shape[-2]))
            b.copy_(own.b.narrow(-1, first, b.shape[-1]))

    def frozen_factors(self) -> Tensor | None:
        """A flat copy of the frozen factors in host memory, in the layout of their rank; None when there are none."""
        if not self.frozen_rank:
            return None
        layout = self.layout.of_rank(self.frozen_rank)
        frozen = torch.empty(layout.num_params, dtype=torch.float32)
        for site, (a, b) in layout.pairs(frozen).items():
            own = self.pairs[site]
            # Whole, which needs no room on their device; a part of b's columns would be gathered there.
            a.copy_(own.a.cpu().narrow(-2, 0, self.frozen_rank))
            b.copy_(own.b.cpu().narrow(-1, 0, self.frozen_rank))
        return frozen


def joined(layout: AdapterLayout, frozen: Tensor, weights: Tensor) -> Factors:
    """Frozen factors, flat in the layout of a multiple of the rank, before trained ones, flat in layout; copies of both."""
    frozen_layout = layout.of_rank(layout.rank * (frozen.numel() // layout.num_params))
    frozen_rank = frozen_layout.rank
    factors = Factors.empty(layout.of_rank(frozen_rank + layout.rank), frozen_rank=frozen_rank, device=weights.device)
    factors.put(frozen_layout.pairs(frozen), first=0)
    factors.put(layout.pairs(weights), first=frozen_rank)
    return factors
