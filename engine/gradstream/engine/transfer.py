"""Numbers on their way to the device and back, so that neither side waits for the other where it need not."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]] | Tensor, device: torch.device) -> Tensor:
    """A copy of values in host memory, on the device. On GPUs it is there when the device comes to what needs it; nothing waits for it."""
    # A copy: arrays of the wire are read-only, which torch does not accept.
    host = torch.tensor(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in host memory, float32 on GPUs: by one copy and one wait for all of them. What is there already is given as it is."""
    if not tensors or tensors[0].device.type != "cuda":
        return list(tensors)
    together = torch.cat([tensor.flatten().float() for tensor in tensors])
    host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    host.copy_(together, non_blocking=True)
    torch.cuda.current_stream(together.device).synchronize()
    parts = torch.split(host, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
