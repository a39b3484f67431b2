"""An adapter's contents as plain bytes: what a save takes from memory, and what a load brings back to every rank."""

import msgspec
import torch
from torch import Tensor

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.factors import Factors
from gradstream.engine.checkpoint.manifest import Manifest


class AdapterContent(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that was read. weights: float32, flat, in the layout of manifest.lora with its stored_rank, native byte order.

    optim: the tensors of manifest.optimizer by name, as `state_parts` describes them, if has_optimizer; empty when they were not asked for.
    """

    manifest: Manifest
    weights: bytes
    has_optimizer: bool = False
    optim: dict[str, bytes] = {}


def to_bytes(flat: Tensor) -> bytes:
    """The values of a flat tensor of any dtype."""
    return flat.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def to_tensor(data: bytes, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The flat tensor of data; its own memory."""
    if not data:
        return torch.empty(0, dtype=dtype, device=device)
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)


def factors_of(adapter: Adapter, content: AdapterContent) -> Factors:
    """The factors of a checkpoint for an adapter of its spec: on its device if some are frozen, else in host memory."""
    layout = adapter.layout.of_rank(content.manifest.stored_rank)
    frozen_rank = layout.rank - adapter.layout.rank
    device = adapter.weights.device if frozen_rank else torch.device("cpu")
    return Factors(layout, to_tensor(content.weights, device=device), frozen_rank)


def restore(adapter: Adapter, content: AdapterContent, factors: Factors | None = None) -> None:
    """Put content into adapter and forget its gradient; without the optimizer's state that starts fresh at step 0.

    A state that is there must be of an optimizer like the adapter's, as `load_content` has checked. factors: `factors_of` the two, None
    to make them here.
    """
    # From host memory: the device may have no room for a second copy.
    device, manifest = torch.device("cpu"), content.manifest
    adapter.take(factors_of(adapter, content) if factors is None else factors)
    for name, tensor in adapter.optim.items():
        if content.has_optimizer:
            tensor.copy_(to_tensor(content.optim[name], device=device, dtype=tensor.dtype))
        else:
            tensor.zero_()
    adapter.step = manifest.step if content.has_optimizer else 0
    adapter.optim_began = manifest.optim_began if content.has_optimizer else 0
    adapter.scale = manifest.scale
    adapter.clear_grad()
