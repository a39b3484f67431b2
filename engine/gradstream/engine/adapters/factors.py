"""The factors that a forward pass multiplies with: an adapter's trained ones, and before them those that are frozen.

Legend: R rank of all factors, F that of the frozen ones, I in features, O out features.
"""

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

    @cached_property
    def pairs(self) -> dict[int, LoraPair]:
        """Views into the weights, by site index."""
        return self.layout.pairs(self.weights)

    def pairs_in(self, dtype: torch.dtype) -> dict[int, LoraPair]:
        """The factors of each site in a dtype, by site index; the weights themselves where it is theirs."""
        return self.pairs if self.weights.dtype == dtype else self.layout.pairs(self.weights.to(dtype))
