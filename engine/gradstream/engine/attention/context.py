"""The object that a forward pass hands to every attention layer.

Legend: T tokens of the pass, H query heads, G key heads, K head size.
"""

from typing import Protocol

from torch import Tensor

from gradstream.engine.attention.registry import PackedAttention
from gradstream.engine.attention.segments import Segments


class AttentionContext(Protocol):
    """Knows which tokens see which. Made for one pass (or one cache), given to BaseModel.hidden."""

    def attend(self, layer: int, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, *, scaling: float) -> Tensor:
        """out_THK for the T new tokens of layer (from 0). Keys come after the rotary embedding."""
        ...


class PackedContext:
    """Sequences end to end without padding; nothing is kept between passes."""

    def __init__(self, segments: Segments, run: PackedAttention) -> None:
        self.segments = segments
        self._run = run

    def attend(self, layer: int, q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, *, scaling: float) -> Tensor:
        del layer
        return self._run(q_HTK, k_GTK, v_GTK, self.segments, scaling)
