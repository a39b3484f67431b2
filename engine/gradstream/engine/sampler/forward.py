"""The model's passes as the sampler runs them: without gradients, and where they may be, faster than in training.

Legend: T tokens of a pass, N tokens whose logits are wanted, D hidden, V vocabulary.
"""

from collections.abc import Sequence

from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.adapters.passes import AdapterPass
from gradstream.engine.attention.context import AttentionContext
from gradstream.engine.head import logits
from gradstream.engine.models.base import BaseModel
from gradstream.engine.products import frozen_products, linear


class Forward:
    """Passes of one base model. is_exact: with the bits of training; else they may differ in rounding."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._products = frozen_products(base.head_weight)
        # Neighbours with the same adapter, and the pass that was made of them; decoding asks for the same again and again.
        self._last: tuple[list[tuple[int, int, LoraWeights | None]], AdapterPass] | None = None

    def hidden(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        *,
        attention: AttentionContext,
        adapters: AdapterPass,
        is_exact: bool = False,
    ) -> Tensor:
        """hidden_TD after the final norm."""
        product = linear if self._products is None or is_exact else self._products.linear
        return self._base.hidden(tokens_T, positions_T, attention=attention, adapters=adapters, product=product)

    def logits(self, hidden_ND: Tensor, adapters: AdapterPass) -> Tensor:
        """float32 [N, V]."""
        if self._products is None:
            return logits(self._base, hidden_ND, adapters)
        logits_NV = self._products.linear(hidden_ND, self._base.head_weight, None)
        for patch in adapters.patches(self._base.head_site.index):
            low_TR = hidden_ND[patch.start : patch.end] @ patch.weight.a.t()
            patch.of(logits_NV).addmm_(low_TR, patch.weight.b.t(), alpha=patch.scale)
        return logits_NV

    def adapters(self, adapters: Sequence[LoraWeights | None], lengths: Sequence[int]) -> AdapterPass:
        """For sequences of these lengths that lie end to end: one slice for each stretch of neighbours with the same adapter."""
        slices: list[tuple[int, int, LoraWeights | None]] = []
        start = 0
        for adapter, length in zip(adapters, lengths, strict=True):
            if slices and slices[-1][2] is adapter:
                slices[-1] = (slices[-1][0], start + length, adapter)
            else:
                slices.append((start, start + length, adapter))
            start += length
        if self._last is None or not _same(self._last[0], slices):
            self._last = slices, self._base.adapter_pass(slices)
        return self._last[1]

    def forget(self) -> None:
        """Let go of adapters."""
        self._last = None


def _same(one: list[tuple[int, int, LoraWeights | None]], other: list[tuple[int, int, LoraWeights | None]]) -> bool:
    """True for the same stretches of the very same adapters; those of samplers never change."""
    return len(one) == len(other) and all(
        left[:2] == right[:2] and left[2] is right[2] for left, right in zip(one, other, strict=True)
    )
