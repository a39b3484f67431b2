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
    """lse_: logits [N, V] -> [N]. Their place then holds what weigh_ goes on from: the softmax in eager mode, in compiled mode the logits.

    weigh_: (place, lse [N], weight [N], is_begun) -> weight * softmax in the same place, 0 for weight 0. is_begun: lse_ was there; else
    the place holds the logits. It makes no difference in compiled mode, where the place holds them either way.
    """

    lse_: Callable[[Tensor], Tensor]
    weigh_: Callable[[Tensor, Tensor, Tensor, bool], Tensor]

    @classmethod
    def of(cls, mode: Literal["compiled", "eager"]) -> "Softmax":
        """compiled: kernels of torch's compiler; eager: torch's own softmax, of which lse follows from the largest logit's share."""
        return _COMPILED if mode == "compiled" else _EAGER


def warm_up(vocab_size: int, device: torch.device) -> None:
    """Make the compiled kernels, always from the same sizes."""
    logits_NV = torch.zeros(_WARM_TOKENS, vocab_size, device=device)
    lse_N = _COMPILED.lse_(logits_NV)
    _COMPILED.weigh_(logits_NV, lse_N, torch.ones_like(lse_N), True)


def _eager_lse_(logits_NV: Tensor) -> Tensor:
    """The place of the logits then holds the softmax. nan where a logit is nan or inf, or all are -inf."""
    largest_N = logits_NV.amax(dim=1)
    return largest_N - torch.softmax(logits_NV, dim=1, out=logits_NV).amax(dim=1).log_()


def _eager_weigh_(place_NV: Tensor, lse_N: Tensor, weight_N: Tensor, is_begun: bool) -> Tensor:
    if not is_begun:
        torch.softmax(place_NV, dim=1, out=place_NV)
    place_NV.mul_(weight_N[:, None])
    # 0 times nan is none; where the device need not be waited for, a look saves going over it all.
    if lse_N.device.type == "cpu" and lse_N.isfinite().all():
        return place_NV
    return place_NV.masked_fill_((weight_N == 0)[:, None], 0.0)


def _lse(logits_NV: Tensor) -> Tensor:
    return logits_NV.logsumexp(dim=-1)


def _weigh_once_(logits_NV: Tensor, lse_N: Tensor, weight_N: Tensor) -> None:
    weighed_NV = (logits_NV - lse_N[:, None]).exp() * weight_N[:, None]
    logits_NV.copy_(torch.where((weight_N == 0)[:, None], 0.0, weighed_NV))


@cache
def _kernels() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], None]]:
    return compiled(_lse), compiled(_weigh_once_)


def _compiled_lse(logits_NV: Tensor) -> Tensor:
    # One token would be a kernel of its own.
    return _kernels()[0](logits_NV) if len(logits_NV) > 1 else _lse(logits_NV)


def _compiled_weigh_(place_NV: Tensor, lse_N: Tensor, weight_N: Tensor, _is_begun: bool) -> Tensor:
    if len(place_NV) == 1:
        return _eager_weigh_(place_NV, lse_N, weight_N, False)
    _kernels()[1](place_NV, lse_N, weight_N)
    return place_NV


_EAGER = Softmax(_eager_lse_, _eager_weigh_)
_COMPILED = Softmax(_compiled_lse, _compiled_weigh_)
