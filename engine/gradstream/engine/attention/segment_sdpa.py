"""One scaled_dot_product_attention call for each distinct segment length, for some short ones padded, or for each of a parent's children.

Legend: T tokens of the row, S segments of a group, N their length, M tokens that the last of them sees, H query heads, G key heads, K head
size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gradstream.engine.attention.registry import ATTENTION, AttentionBackend
from gradstream.engine.attention.segments import MASK_ROWS, SegmentGroup, Segments
from gradstream.engine.padding import Collect, Spread


def segment_sdpa(q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, segments: Segments, scaling: float) -> Tensor:
    """out_THK; segments never see each other because they are different batch entries."""
    is_grouped = q_HTK.shape[0] != k_GTK.shape[0]
    grouping = segments.grouping(q_HTK.shape[0] * q_HTK.shape[2])
    outs_THK = []
    for group in grouping.groups:
        if group.context:
            out_SHNK = _after_context(q_HTK, k_GTK, v_GTK, group, segments, scaling)
        else:
            q_SHNK, k_SGNK, v_SGNK = (_pick(heads, group) for heads in (q_HTK, k_GTK, v_GTK))
            out_SHNK = F.scaled_dot_product_attention(
                q_SHNK, k_SGNK, v_SGNK, is_causal=True, scale=scaling, enable_gqa=is_grouped
            )
        outs_THK.append(_tokens_first(out_SHNK, group))
    out_THK = outs_THK[0] if len(outs_THK) == 1 else torch.cat(outs_THK)
    return out_THK if grouping.ungroup is None else out_THK.index_select(0, grouping.ungroup)


def _tokens_first(out_SHNK: Tensor, group: SegmentGroup) -> Tensor:
    """The group's tokens, segment after segment, [T, H, K]."""
    out_SNHK = out_SHNK.transpose(1, 2)
    if group.padding is None:
        return out_SNHK.flatten(0, 1)
    out_THK: Tensor = Collect.apply(out_SNHK, group.padding)  # type: ignore[no-untyped-call]  # torch's
    return out_THK


def _after_context(
    q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, group: SegmentGroup, segments: Segments, scaling: float
) -> Tensor:
    """out_SHNK of segments that continue another one: in blocks of queries, each with the keys up to its last token."""
    q_SHNK = _pick(q_HTK, group)
    k_SGMK, v_SGMK = (_with_context(heads, group) for heads in (k_GTK, v_GTK))
    repeats = q_HTK.shape[0] // k_GTK.shape[0]
    if repeats > 1 and q_HTK.is_cuda:
        # The CUDA kernels that take a mask know no grouped heads.
        k_SGMK, v_SGMK = (heads.repeat_interleave(repeats, dim=1) for heads in (k_SGMK, v_SGMK))
        repeats = 1
    outs = []
    for start in range(0, group.length, MASK_ROWS):
        end = min(start + MASK_ROWS, group.length)
        num_keys = group.num_context + end
        out = F.scaled_dot_product_attention(
            q_SHNK[:, :, start:end],
            k_SGMK[:, :, :num_keys],
            v_SGMK[:, :, :num_keys],
            attn_mask=segments.causal_mask(end - start, num_keys),
            scale=scaling,
            enable_gqa=repeats > 1,
        )
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _with_context(x_GTK: Tensor, group: SegmentGroup) -> Tensor:
    """What the group's segments see, [S, G, M, K]: their common ancestors, and then each itself."""
    own_SGNK = _pick(x_GTK, group)
    before = [x_GTK[:, start:end].expand(group.num_segments, -1, -1, -1) for start, end in group.context]
    return torch.cat([*before, own_SGNK], dim=2)


def _pick(x_HTK: Tensor, group: SegmentGroup) -> Tensor:
    """The group's segments as [S, H, N, K]; a view where they lie side by side. Causal masks hide what pads, which comes last."""
    if group.padding is not None:
        x_SNHK: Tensor = Spread.apply(x_HTK.transpose(0, 1), group.padding)  # type: ignore[no-untyped-call]  # torch's
        return x_SNHK.transpose(1, 2)
    num_tokens = group.num_segments * group.length
    if group.index_T is None:
        picked = x_HTK if x_HTK.shape[1] == num_tokens else x_HTK.narrow(1, group.start, num_tokens)
    else:
        picked = x_HTK.index_select(1, group.index_T)
    heads, _, size = picked.shape
    return picked.view(heads, group.num_segments, group.length, size).transpose(0, 1)


ATTENTION.register("segment_sdpa")(AttentionBackend(run=segment_sdpa, refusal=lambda _device, _dtype: None, rank=1))
