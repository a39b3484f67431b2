"""The table of attention back-ends for packed rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.attention.segments import Segments
from gradstream.engine.registry import Registry

# (q_HTK, k_GTK, v_GTK, segments, scaling) -> out_THK, for H query heads on G key heads of size K.
PackedAttention = Callable[[Tensor, Tensor, Tensor, Segments, float], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """refusal: why it cannot run on (device, dtype), as a sentence, or None. Higher rank wins under "auto".

    version: of the package that its kernels come from, empty where that is torch.
    """

    run: PackedAttention
    refusal: Callable[[torch.device, torch.dtype], str | None]
    rank: int
    version: Callable[[], str] = str


ATTENTION: Registry[str, AttentionBackend] = Registry("attention back-end")
