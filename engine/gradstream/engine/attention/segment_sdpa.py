"""One scaled_dot_product_attention call for each distinct segment length.

Legend: T tokens of the row, S segments of a group, N their length, H query heads, G key heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstream.engine.attention.registry import ATTENTION, AttentionBackend
from gradstream.engine.attention.segments import EqualLengths, Segments


def segment_sdpa(q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, segments: Segments, scaling: float) -> Tensor:
    """out_THK; segments never see each other because they are different batch entries."""
    is_grouped = q_HTK.shape[0] != k_GTK.shape[0]
    outs_THK = []
    for group in segments.groups:
        q_SHNK, k_SGNK, v_SGNK = (_pick(heads, group) for heads in (q_HTK, k_GTK, v_GTK))
        out_SHNK = F.scaled_dot_product_attention(
            q_SHNK, k_SGNK, v_SGNK, is_causal=True, scale=scaling, enable_gqa=is_grouped
        )
        outs_THK.append(out_SHNK.transpose(1, 2).flatten(0, 1))
    if len(outs_THK) == 1 and segments.ungroup is None:
        return outs_THK[0]
    out_THK = torch.cat(outs_THK)
    return out_THK if segments.ungroup is None else out_THK.index_select(0, segments.ungroup)


def _pick(x_HTK: Tensor, group: EqualLengths) -> Tensor:
    """The group's segments as [S, H, N, K]; a view where they lie side by side."""
    num_tokens = group.num_segments * group.length
    if group.is_contiguous:
        picked = x_HTK if x_HTK.shape[1] == num_tokens else x_HTK.narrow(1, group.start, num_tokens)
    else:
        picked = x_HTK.index_select(1, group.index_T)
    heads, _, size = picked.shape
    return picked.view(heads, group.num_segments, group.length, size).transpose(0, 1)


ATTENTION.register("segment_sdpa")(AttentionBackend(run=segment_sdpa, refusal=lambda _device, _dtype: None, rank=1))
