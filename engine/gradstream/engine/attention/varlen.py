"""torch's variable-length flash attention, for CUDA devices.

Legend: T tokens of the row, H query heads, G key heads, K head size.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from gradstream.engine.attention.registry import ATTENTION, AttentionBackend
from gradstream.engine.attention.segments import Segments

_MODULE = "torch.nn.attention.varlen"


def _load() -> Callable[..., Tensor] | None:
    if importlib.util.find_spec(_MODULE) is None:
        return None
    run: Callable[..., Tensor] = importlib.import_module(_MODULE).varlen_attn
    return run


_VARLEN = _load()
_PARAMETERS = frozenset(inspect.signature(_VARLEN).parameters) if _VARLEN is not None else frozenset()


def varlen_attention(q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, segments: Segments, scaling: float) -> Tensor:
    """out_THK; half precision only. The last query of a segment is aligned with its last key, as in flash attention since 2.1."""
    assert _VARLEN is not None
    if segments.key_index is not None:
        k_GTK, v_GTK = (heads.index_select(1, segments.key_index) for heads in (k_GTK, v_GTK))
    q_THK, k_TGK, v_TGK = (heads.transpose(0, 1) for heads in (q_HTK, k_GTK, v_GTK))
    options: dict[str, object] = {"scale": scaling}
    # torch 2.10 says is_causal, later versions a window whose right side is 0.
    if "is_causal" in _PARAMETERS:
        options["is_causal"] = True
    else:
        options["window_size"] = (-1, 0)
    if q_THK.shape[1] != k_TGK.shape[1]:
        if "enable_gqa" in _PARAMETERS:
            options["enable_gqa"] = True
        else:
            repeats = q_THK.shape[1] // k_TGK.shape[1]
            k_TGK, v_TGK = (heads.repeat_interleave(repeats, dim=1) for heads in (k_TGK, v_TGK))
    longest = max(segments.lengths), max(segments.key_lengths)
    return _VARLEN(q_THK, k_TGK, v_TGK, segments.offsets, segments.key_offsets, *longest, **options)


def _refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    if _VARLEN is None:
        return f"this torch ({torch.__version__}) has no {_MODULE}; use attention: segment_sdpa"
    if "scale" not in _PARAMETERS:
        return f"this torch's varlen_attn ({torch.__version__}) cannot scale; use attention: segment_sdpa"
    if device.type != "cuda":
        return f"varlen attention runs on CUDA only, and the device is {device.type}; use attention: segment_sdpa"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen attention needs half precision, and the dtype is {dtype}; use attention: segment_sdpa"
    return None


ATTENTION.register("varlen")(AttentionBackend(run=varlen_attention, refusal=_refusal, rank=2))
