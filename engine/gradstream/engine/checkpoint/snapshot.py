"""An adapter's contents as plain bytes: what a save takes from memory, and what a load brings back to every rank."""

import msgspec
import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.checkpoint.manifest import Manifest


class AdapterContent(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was read. weights and the moments: float32, flat, in the layout of manifest.lora, native byte order.

    The moments are empty when they were not asked for.
    """

    manifest: Manifest
    weights: bytes
    exp_avg: bytes = b""
    exp_avg_sq: bytes = b""


def to_bytes(flat: Tensor) -> bytes:
    """The values of a flat float32 tensor."""
    assert flat.dtype == torch.float32
    return flat.detach().cpu().numpy().tobytes()


def to_tensor(data: bytes, *, device: torch.device) -> Tensor:
    """The flat float32 tensor of data; its own memory."""
    return torch.frombuffer(bytearray(data), dtype=torch.float32).to(device)


def restore(adapter: Adapter, content: AdapterContent) -> None:
    """Put content into adapter and forget its gradient; without moments the optimizer starts fresh at step 0."""
    device = adapter.weights.device
    adapter.weights.copy_(to_tensor(content.weights, device=device))
    if content.exp_avg:
        adapter.exp_avg.copy_(to_tensor(content.exp_avg, device=device))
        adapter.exp_avg_sq.copy_(to_tensor(content.exp_avg_sq, device=device))
        adapter.step = content.manifest.step
    else:
        adapter.exp_avg.zero_()
        adapter.exp_avg_sq.zero_()
        adapter.step = 0
    adapter.scale = content.manifest.scale
    adapter.clear_grad()
