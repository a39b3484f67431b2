"""Which attention back-end a device gets."""

import torch

import gradstream.engine.attention as package
from gradstream.engine.attention.registry import ATTENTION, PackedAttention
from gradstream.engine.registry import import_siblings
from gradstream.shared.errors import Unsupported

AUTO = "auto"


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """The named back-end, or the best one that runs here for "auto".

    Raises Unsupported when the named one is unknown or cannot run on this device; there is no silent fallback.
    """
    import_siblings(package)
    if name == AUTO:
        able = [entry for entry in ATTENTION.values() if entry.refusal(device, dtype) is None]
        return max(able, key=lambda entry: entry.rank).run
    entry = ATTENTION.get(name)
    if entry is None:
        raise Unsupported(f"attention: {name!r} is not known; use one of {AUTO}, {', '.join(sorted(ATTENTION))}")
    refusal = entry.refusal(device, dtype)
    if refusal is not None:
        raise Unsupported(f"attention: {name}: {refusal}")
    return entry.run
