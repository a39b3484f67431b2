"""Which attention back-end a device gets."""

import torch

import gradstream.engine.attention as package
from gradstream.engine.attention.registry import ATTENTION, PackedAttention
from gradstream.engine.registry import import_siblings
from gradstream.shared.errors import Unsupported

AUTO = "auto"


def resolved_attention(name: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """name itself, or that of the best back-end that runs here for "auto"."""
    import_siblings(package)
    if name != AUTO:
        return name
    return max(
        (own for own in ATTENTION if ATTENTION[own].refusal(device, dtype) is None),
        key=lambda own: ATTENTION[own].rank,
    )


def can_attend(name: str, *, device: torch.device, dtype: torch.dtype) -> bool:
    """True if there is a back-end of this name and it runs here."""
    import_siblings(package)
    return name in ATTENTION and ATTENTION[name].refusal(device, dtype) is None


def choose_attention(name: str, *, device: torch.device, dtype: torch.dtype) -> PackedAttention:
    """The named back-end, or the best one that runs here for "auto".

    Raises Unsupported when the named one is unknown or cannot run on this device; there is no silent fallback.
    """
    name = resolved_attention(name, device=device, dtype=dtype)
    entry = ATTENTION.get(name)
    if entry is None:
        raise Unsupported(f"attention: {name!r} is not known; use one of {AUTO}, {', '.join(sorted(ATTENTION))}")
    refusal = entry.refusal(device, dtype)
    if refusal is not None:
        raise Unsupported(f"attention: {name}: {refusal}")
    return entry.run
