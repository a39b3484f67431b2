"""Matrix products. Those of float32 on CPUs go through oneDNN where they are large enough for it to pay.

torch hands float32 products to MKL, which leaves out the widest instructions of processors that are not Intel's. `make bench-engine` and
`make bench-sampling` measure what oneDNN makes of it. How a product is computed follows from the device, dtypes, sizes and strides of its
factors alone, and `library` is part of the fingerprint.

Legend: M, K, N sizes of a product; A adapters; T tokens, I in features, O out features.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from gradstream.shared.config.machine import bound_onednn_kernels

# x [T, I], weight [O, I], bias [O] or None -> [T, O].
LinearProduct = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# What arranged copies may take beside the model; weights that come later are used as they lie.
MAX_PACKED_BYTES = 4 << 30
# For how many tokens a weight is arranged; the same arrangement is as good for one and for hundreds.
_PACK_TOKENS = 16
# Multiplications below which the call itself costs more than the product, of a weight that is arranged.
_MIN_WORK_PACKED = 300_000
# The same of other products. For sizes that are new oneDNN makes kernels first, in 0.1 to 0.2 ms; a model's layers have the same sizes.
_MIN_WORK = 1_000_000
# How many of them are kept, at about 0.6 MB each: those of some rows that a model computes in turn.
_MAX_KERNELS = 64
# MKL takes up to three times as long for fewer columns than this, unless rows and columns change places; and the numbers of a left factor
# from which that pays.
_MANY_COLUMNS = 16
_MIN_NARROW = 8192


def library(device: torch.device, dtype: torch.dtype) -> Literal["onednn", "torch"]:
    """What computes large products there. torch's own choice is as good for other dtypes, and where oneDNN is no part of it all there is."""
    return "onednn" if device.type == "cpu" and dtype == torch.float32 and _has_onednn() else "torch"


def bound_kernels() -> None:
    """Let kernels of sizes that were not used lately be forgotten, before the first product; by default 1,024 are kept."""
    bound_onednn_kernels(_MAX_KERNELS)


def mm(left_MK: Tensor, right_KN: Tensor) -> Tensor:
    """The product, [M, N], of factors in any strides. No gradient flows through it."""
    if not _pays(left_MK, right_KN):
        return (right_KN.t() @ left_MK.t()).t() if _is_narrow(left_MK, right_KN) else left_MK @ right_KN
    # oneDNN copies a left factor that is not contiguous: the smaller one of the two.
    if not left_MK.is_contiguous() and left_MK.numel() > right_KN.numel():
        return _by_onednn(right_KN.t(), left_MK, None).t()
    return _by_onednn(left_MK, right_KN.t(), None)


def _is_narrow(left: Tensor, right: Tensor) -> bool:
    """True for a product [M, N] which is computed faster as (right^T left^T)^T, since it has few columns."""
    return right.stride(-1) == 1 and _is_narrow_batch(left, right)


def _is_narrow_batch(left_AMK: Tensor, right_AKN: Tensor) -> bool:
    """The same for batched products, which it also pays for where the right factors are transposed."""
    if right_AKN.shape[-1] >= _MANY_COLUMNS or right_AKN.device.type != "cpu":
        return False
    return right_AKN.dtype == torch.float32 and left_AMK.numel() >= _MIN_NARROW


def add_mm_(target_MN: Tensor, left_MK: Tensor, right_KN: Tensor, scale: float = 1.0) -> None:
    """Add scale * left right to target, whose dtype may be finer."""
    is_plain = not _pays(left_MK, right_KN) and not _is_narrow(left_MK, right_KN)
    if is_plain and target_MN.dtype == right_KN.dtype:
        target_MN.addmm_(left_MK, right_KN, alpha=scale)
    else:
        target_MN.add_(mm(left_MK, right_KN), alpha=scale)


def bmm(left_AMK: Tensor, right_AKN: Tensor) -> Tensor:
    """The product of each pair, [A, M, N]."""
    if _is_narrow_batch(left_AMK, right_AKN):
        return torch.bmm(right_AKN.transpose(1, 2), left_AMK.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(left_AMK, right_AKN)


def add_bmm_(target_AMN: Tensor, left_AMK: Tensor, right_AKN: Tensor) -> None:
    """Add the product of each pair to target, whose dtype may be finer."""
    # On CPUs a target with gaps, as gradients side by side have, would be copied there and back.
    is_in_place = target_AMN.device.type != "cpu" or target_AMN.is_contiguous()
    if is_in_place and target_AMN.dtype == right_AKN.dtype and not _is_narrow_batch(left_AMK, right_AKN):
        target_AMN.baddbmm_(left_AMK, right_AKN)
    else:
        target_AMN.add_(bmm(left_AMK, right_AKN))


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias, [T, O]. No gradient flows through it."""
    if _pays(x_TI, weight_OI.t()):
        return _by_onednn(x_TI, weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


@cache
def _has_onednn() -> bool:
    is_built_in: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's
    return is_built_in and get_cpu_capability().startswith("AVX")


def _pays(left_MK: Tensor, right_KN: Tensor) -> bool:
    if left_MK.numel() * right_KN.shape[1] < _MIN_WORK or right_KN.dtype != torch.float32:
        return False
    return library(left_MK.device, left_MK.dtype) == "onednn"


def _by_onednn(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    # Of a weight with gaps between its rows or columns it has none but its reference, which is slower a hundred times. Gaps in a bias it
    # does not see.
    is_dense = weight_OI.is_mkldnn or weight_OI.is_contiguous() or weight_OI.t().is_contiguous()
    weight_OI = weight_OI if is_dense else weight_OI.contiguous()
    bias_O = None if bias_O is None else bias_O.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001 (the op that torch's compiler puts in)
        x_TI, weight_OI, bias_O, "none", [], ""
    )
    return out


class FrozenProducts:
    """x W^T + bias on a CPU in float32, also of few tokens, for passes whose last bits need not be those of training.

    oneDNN takes a weight that was arranged for it. The arranged copy is made when a weight is first used and kept.
    """

    def __init__(self, *, max_packed_bytes: int = MAX_PACKED_BYTES) -> None:
        self._room_bytes = max_packed_bytes
        # By the weight's identity, with the weight itself, so that no other can take its place.
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    def linear(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        """[T, O]. weight must never change in place."""
        if len(x_TI) * weight_OI.numel() < _MIN_WORK_PACKED:
            return F.linear(x_TI, weight_OI, bias_O)
        return _by_onednn(x_TI, self._arranged(weight_OI), bias_O)

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
    return FrozenProducts() if library(weight.device, weight.dtype) == "onednn" else None
