"""The product that gives vocabulary logits, and the softmax over them, in the ways that a config can choose.

Legend: N tokens of a chunk, D hidden, V vocabulary, R LoRA rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from gradstream.engine.adapters.slices import Patch
from gradstream.engine.models.compiled import compiled
from gradstream.engine.products import mm

_HALVES = (torch.bfloat16, torch.float16)
# What the kernels are made for: some tokens and one in the backward pass too, so that no job's size decides.
_WARM_TOKENS = 64


class Product:
    """Logits of one unembedding weight [V, D], in float32 at least.

    in_float32: those of a weight in half precision are summed and left in float32; else they are rounded to the weight's dtype first.
    """

    def __init__(self, weight_VD: Tensor, *, in_float32: bool) -> None:
        is_widened = in_float32 and weight_VD.dtype in _HALVES
        self._is_mixed = is_widened and weight_VD.is_cuda
        # Only GPUs have a product of halves that ends in float32.
        self._weight_VD = weight_VD.float() if is_widened and not self._is_mixed else weight_VD
        self._is_widened = is_widened

    def logits(self, x_ND: Tensor, patches: Sequence[Patch], *, at: int = 0) -> Tensor:
        """[N, V] with what the patches add. at: the token of the row that x begins with; patches count from the row's start."""
        if self._is_mixed:
            logits_NV = torch.mm(x_ND, self._weight_VD.t(), out_dtype=torch.float32)
        else:
            logits_NV = mm(x_ND.to(self._weight_VD.dtype), self._weight_VD.t())
        for patch in patches:
            span = slice(max(patch.start - at, 0), patch.end - at)
            self._add(logits_NV[span], x_ND[span], patch)
        return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))

    def _add(self, logits_NV: Tensor, x_ND: Tensor, patch: Patch) -> None:
        a_RD, b_VR = patch.weight
        if self._is_widened:
            x_ND, a_RD, b_VR = x_ND.float(), a_RD.float(), b_VR.float()
        logits_NV.addmm_(mm(x_ND, a_RD.t()), b_VR.t(), alpha=patch.scale)


@dataclass(frozen=True, slots=True)
class Softmax:
    """lse: logits [N, V] -> [N]. weigh_: (logits, lse [N], weight [N]) -> weight * softmax in the place of the logits, 0 for weight 0."""

    lse: Callable[[Tensor], Tensor]
    weigh_: Callable[[Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, mode: Literal["compiled", "eager"]) -> "Softmax":
        """compiled: one kernel each, where eager goes over the logits several times."""
        return _COMPILED if mode == "compiled" else _EAGER


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Make the compiled kernels, always from the same sizes."""
    logits_NV = torch.zeros(_WARM_TOKENS, vocab_size, device=device)
    lse_N = _COMPILED.lse(logits_NV)
    _COMPILED.weigh_(logits_NV, lse_N, torch.ones_like(lse_N))


def _lse(logits_NV: Tensor) -> Tensor:
    return logits_NV.logsumexp(dim=-1)


def _weigh_(logits_NV: Tensor, lse_N: Tensor, weight_N: Tensor) -> Tensor:
    logits_NV.sub_(lse_N[:, None]).exp_().mul_(weight_N[:, None])
    return logits_NV.masked_fill_((weight_N == 0)[:, None], 0.0)


def _weigh_once_(logits_NV: Tensor, lse_N: Tensor, weight_N: Tensor) -> None:
    weighed_NV = (logits_NV - lse_N[:, None]).exp() * weight_N[:, None]
    logits_NV.copy_(torch.where((weight_N == 0)[:, None], 0.0, weighed_NV))


@cache
def _kernels() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], None]]:
    return compiled(_lse), compiled(_weigh_once_)


def _compiled_lse(logits_NV: Tensor) -> Tensor:
    # One token would be a kernel of its own.
    return _kernels()[0](logits_NV) if len(logits_NV) > 1 else _lse(logits_NV)


def _compiled_weigh_(logits_NV: Tensor, lse_N: Tensor, weight_N: Tensor) -> Tensor:
    if len(logits_NV) == 1:
        return _weigh_(logits_NV, lse_N, weight_N)
    _kernels()[1](logits_NV, lse_N, weight_N)
    return logits_NV


_EAGER = Softmax(_lse, _weigh_)
_COMPILED = Softmax(_compiled_lse, _compiled_weigh_)
