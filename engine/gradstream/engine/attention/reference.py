"""Masked attention written out; the slow truth that the other back-ends are compared with.

Legend: T tokens of the row, H query heads, G key heads, K head size.
"""

import torch
from torch import Tensor

from gradstream.engine.attention.registry import ATTENTION, AttentionBackend
from gradstream.engine.attention.segments import Segments


def reference_attention(q_HTK: Tensor, k_GTK: Tensor, v_GTK: Tensor, segments: Segments, scaling: float) -> Tensor:
    """out_THK; scores and softmax in at least float32, O(T^2) memory."""
    repeats = q_HTK.shape[0] // k_GTK.shape[0]
    k_HTK = k_GTK.repeat_interleave(repeats, dim=0)
    v_HTK = v_GTK.repeat_interleave(repeats, dim=0)
    compute = torch.promote_types(q_HTK.dtype, torch.float32)
    scores_HTT = (q_HTK.to(compute) @ k_HTK.to(compute).transpose(1, 2)) * scaling
    ids_T = segments.ids
    num_tokens = segments.num_tokens
    is_causal_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=ids_T.device).tril()
    is_own_TT = is_causal_TT & (ids_T[:, None] == ids_T[None, :])
    allowed_TT = is_own_TT | segments.sees[ids_T[:, None], ids_T[None, :]]
    probs_HTT = scores_HTT.masked_fill(~allowed_TT, float("-inf")).softmax(dim=-1)
    return (probs_HTT @ v_HTK.to(compute)).to(q_HTK.dtype).transpose(0, 1)


ATTENTION.register("reference")(AttentionBackend(run=reference_attention, refusal=lambda _device, _dtype: None, rank=0))
