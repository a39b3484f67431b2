"""A device with little memory: torch's own operations ask it for every tensor that they make, and are refused what it has not left."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_REFUSAL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1.00 GiB"


class SmallDevice(TorchDispatchMode):
    """Counts what tensors hold that are made while it is entered, until they are gone.

    room_bytes: what they may hold together; None for no bound. refused: numbers of allocations that fail whatever there is, from 0.
    peak_bytes, num_allocations: what was seen.
    """

    def __init__(self, *, room_bytes: int | None = None, refused: Sequence[int] = ()) -> None:
        super().__init__()
        self.room_bytes = room_bytes
        self.held_bytes = self.peak_bytes = self.num_allocations = self.num_refusals = 0
        self._refused = frozenset(refused)
        # By address.
        self._held: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in _storages((args, kwargs))}
        made = func(*args, **kwargs)
        for storage in _storages(made):
            if storage._cdata not in given | self._held:
                self._take(storage)
        return made

    def _take(self, storage: torch.UntypedStorage) -> None:
        number, self.num_allocations = self.num_allocations, self.num_allocations + 1
        num_bytes = storage.nbytes()
        is_full = self.room_bytes is not None and self.held_bytes + num_bytes > self.room_bytes
        if is_full or number in self._refused:
            self.num_refusals += 1
            raise torch.OutOfMemoryError(_REFUSAL)
        self._held.add(storage._cdata)
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        weakref.finalize(storage, self._give_back, storage._cdata, num_bytes)

    def _give_back(self, address: int, num_bytes: int) -> None:
        self._held.remove(address)
        self.held_bytes -= num_bytes


def _storages(values: object) -> list[torch.UntypedStorage]:
    """Of the tensors among the values, but for those in a layout of another library."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
    return [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
