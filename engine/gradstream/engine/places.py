"""Values of a row's datum tokens, laid out beside its computed tokens and back.

Legend: E tokens of the row's datums end to end, C candidates (targets) per token, T tokens that are computed, W candidates of all datums of a
computed token.
"""

import torch
from torch import Tensor

from gradstream.engine.row_layout import RowLayout
from gradstream.engine.transfer import to_device


class Places:
    """Where each datum's own targets, log-probabilities and gradients lie: what several datums share is computed once, and evaluated
    for each of them in columns of its own.
    """

    def __init__(self, layout: RowLayout, *, num_candidates: int, device: torch.device) -> None:
        """num_candidates: C."""
        self.source_T = to_device(layout.source_of_computed(), device)
        self._shape = (layout.num_tokens, layout.num_slots * num_candidates)
        first_E = layout.computed_of_source() * self._shape[1] + layout.slots() * num_candidates
        self._place_EC = to_device(first_E, device)[:, None] + torch.arange(num_candidates, device=device)

    def spread(self, values_EC: Tensor) -> Tensor:
        """[T, W]; 0 where a computed token has fewer datums than another."""
        values_TW = values_EC.new_zeros(self._shape)
        # No two values have one place.
        values_TW.view(-1).scatter_(0, self._place_EC.flatten(), values_EC.flatten())
        return values_TW

    def collect(self, values_TW: Tensor) -> Tensor:
        """[E, C]; what spread was given."""
        return values_TW.take(self._place_EC)
