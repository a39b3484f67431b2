"""The collectives that the engine and the worker need, on one process group or on none."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from gradstream.shared.config.machine import launched_place

# A rank may load a large model while its peers wait in their first collective.
DEFAULT_TIMEOUT_S = 1800.0
# Of a tensor that goes to every rank, at a time.
_BROADCAST_BYTES = 256 << 20


class Comm:
    """One rank's place among its peers. With size 1 there is no process group and nothing is communicated.

    Every method except the properties is collective: all ranks call it in the same order with tensors of the same shape.
    """

    def __init__(self, *, rank: int, size: int) -> None:
        self._rank = rank
        self._size = size

    @classmethod
    def single(cls) -> "Comm":
        """The only rank there is."""
        return cls(rank=0, size=1)

    @classmethod
    def from_env(cls, *, device: str = "cpu", meet: Path | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> "Comm":
        """Join the group that torchrun's environment describes; gloo on CPU, gloo and NCCL on an accelerator.

        Without torchrun's variables, or with one rank, this is `single()`. meet: a file that the ranks of one machine share, where
        they meet instead of at torchrun's address, whose store would listen on every interface. A collective that waits longer
        than timeout_s raises (gloo) or ends the process (NCCL). Raises RuntimeError when the rendezvous fails.
        """
        place = launched_place()
        if place is None or place.size == 1:
            return cls.single()
        if meet is None:
            return cls.join("env://", rank=None, size=None, device=device, timeout_s=timeout_s)
        return cls.join(f"file://{meet}", rank=place.rank, size=place.size, device=device, timeout_s=timeout_s)

    @classmethod
    def join(
        cls,
        init_method: str,
        *,
        rank: int | None,
        size: int | None,
        device: str = "cpu",
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "Comm":
        """Join a group at a rendezvous address; rank and size None means that the address knows them."""
        backend = "gloo" if device == "cpu" else f"cpu:gloo,{torch.device(device).type}:nccl"
        dist.init_process_group(
            backend=backend,
            init_method=init_method,
            rank=-1 if rank is None else rank,
            world_size=-1 if size is None else size,
            timeout=timedelta(seconds=timeout_s),
        )
        return cls(rank=dist.get_rank(), size=dist.get_world_size())

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def is_leader(self) -> bool:
        return self._rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace tensor by its sum over all ranks, the same bits on each; the tensor itself is returned."""
        if self._size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace a flat tensor by rank 0's, bit by bit; the tensor itself is returned."""
        if self._size > 1:
            for part in torch.split(tensor.view(torch.uint8), _BROADCAST_BYTES):
                dist.broadcast(part, src=0)
        return tensor

    def broadcast_bytes(self, data: bytes | None = None) -> bytes:
        """Rank 0's bytes, on every rank; the others pass None."""
        if self._size == 1:
            assert data is not None
            return data
        length = torch.tensor([len(data) if data is not None else 0], dtype=torch.int64)
        dist.broadcast(length, src=0)
        buffer = torch.empty(int(length.item()), dtype=torch.uint8)
        if data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        if buffer.numel():
            dist.broadcast(buffer, src=0)
        return buffer.numpy().tobytes()

    def gather_bytes(self, data: bytes) -> list[bytes] | None:
        """On rank 0 the bytes of every rank in rank order; None on the others."""
        if self._size == 1:
            return [data]
        lengths = torch.zeros(self._size, dtype=torch.int64)
        lengths[self._rank] = len(data)
        dist.all_reduce(lengths)
        padded = torch.zeros(int(lengths.max().item()), dtype=torch.uint8)
        if data:
            padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts = [torch.empty_like(padded) for _ in range(self._size)] if self.is_leader else None
        dist.gather(padded, parts, dst=0)
        if parts is None:
            return None
        return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths.tolist(), strict=True)]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self._size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group. Idempotent."""
        if self._size > 1 and dist.is_initialized():
            dist.destroy_process_group()
