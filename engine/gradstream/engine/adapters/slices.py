"""A row's slices: which tokens go with which adapter, and what that is at one site.

Legend: T tokens of the row, O out features.
"""

from dataclasses import dataclass

from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.factors import Factors
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

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def adapter(self) -> LoraWeights:
        """The weights of a slice that has some."""
        assert self.weights is not None
        return self.weights

    @property
    def factors(self) -> Factors:
        """The factors of a slice that has some."""
        return self.adapter.factors


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
