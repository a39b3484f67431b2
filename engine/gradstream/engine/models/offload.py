"""Activations that wait in host memory for the backward pass."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Smaller tensors cost more to move than they take.
MIN_BYTES = 64 << 10


class _Moved(NamedTuple):
    """host: the values in host memory, with the same strides. device: where they came from."""

    host: Tensor
    device: torch.device


def on_accelerator(tensor: Tensor) -> bool:
    return tensor.is_cuda


class ActivationOffload:
    """Moves what autograd saves in a forward pass to host memory, and back when the backward pass asks for it; bits stay.

    Parameters stay where they are. Copies go through pinned memory in the order of the stream, so nothing waits for them but what
    reads them.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        is_far: Callable[[Tensor], bool] = on_accelerator,
        min_bytes: int = MIN_BYTES,
    ) -> None:
        """is_far: whether a tensor lies where memory is short."""
        self._causal_lm = causal_lm
        self._is_far = is_far
        self._min_bytes = min_bytes
        self._kept: frozenset[int] = frozenset()

    def saving(self) -> saved_tensors_hooks:
        """The block of a forward pass. Its backward pass may come after the block."""
        # Asked anew in every pass: weights that went to sleep lie elsewhere when they wake.
        self._kept = frozenset(_storage(parameter) for parameter in self._causal_lm.parameters())
        return saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Moved:
        is_small = tensor.nbytes < self._min_bytes
        if is_small or not self._is_far(tensor) or _storage(tensor) in self._kept:
            return tensor
        with torch.no_grad():
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            host.copy_(tensor, non_blocking=True)
        return _Moved(host, tensor.device)


def _unpack(packed: Tensor | _Moved) -> Tensor:
    return packed.host.to(packed.device, non_blocking=True) if isinstance(packed, _Moved) else packed


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
