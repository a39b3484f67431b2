"""Products with weights that never change, on CPUs, by oneDNN: for passes whose last bits need not be those of training.

torch hands float32 products to MKL, which arranges the whole weight anew at every call and leaves out the widest instructions of
processors that are not Intel's. oneDNN takes a weight that was arranged once. `make bench-sampling` measures the sampler with it.

Legend: T tokens, I in features, O out features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

# x [T, I], weight [O, I], bias [O] or None -> [T, O].
LinearProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# What arranged copies may take beside the model; weights that come later are used as they lie.
MAX_PACKED_BYTES = 4 << 30
# For how many tokens a weight is arranged; the same arrangement is as good for one and for hundreds.
_PACK_TOKENS = 16
# Multiplications below which the call itself costs more than the product.
_MIN_WORK = 300_000


class FrozenProducts:
    """x W^T + bias on a CPU in float32. The arranged copy of a weight is made when it is first used and kept."""

    def __init__(self, *, max_packed_bytes: int = MAX_PACKED_BYTES) -> None:
        self._room_bytes = max_packed_bytes
        # By the weight's identity, with the weight itself, so that no other can take its place.
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """[T, O]. weight must never change in place."""
        if len(x_TI) * weight_OI.numel() < _MIN_WORK:
            return F.linear(x_TI, weight_OI, bias_O)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 (the op that torch's compiler puts in)
            x_TI, self._arranged(weight_OI), bias_O, "none", [], ""
        )
        return out

    def _arranged(self, weight_OI: Tensor) -> Tensor:
        found = self._packed.get(id(weight_OI))
        if found is not None:
            return found[1]
        if weight_OI.nbytes > self._room_bytes:
            return weight_OI
        self._room_bytes -= weight_OI.nbytes
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), _PACK_TOKENS)  # noqa: SLF001
        self._packed[id(weight_OI)] = (weight_OI, packed)
        return packed


def frozen_products(weight: Tensor) -> FrozenProducts | None:
    """For a model with weights like this one; None where torch's own products are as good, or oneDNN is not part of torch."""
    is_ours = weight.device.type == "cpu" and weight.dtype == torch.float32 and get_cpu_capability().startswith("AVX")
    return FrozenProducts() if is_ours and torch.backends.mkldnn.is_available() else None  # type: ignore[no-untyped-call]  # torch's
