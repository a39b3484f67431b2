"""A short comparison that shows whether our seams compute what transformers computes.

Legend: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradstream.engine.models.base import BaseModel
from gradstream.shared.errors import Unsupported

_LENGTHS = (7, 5, 6)
# What the last sequence has in common with the first.
_NUM_COMMON = 4
# Relative to the largest logit. Half precision differs by rounding order.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class Probe:
    """Three short sequences with the last logits that transformers gives them one by one."""

    tokens: list[Tensor]
    logits_V: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, causal_lm: nn.Module) -> "Probe":
        """Run the untouched model."""
        weight: Tensor = causal_lm.get_parameter("lm_head.weight")
        generator = torch.Generator().manual_seed(0)
        tokens = [torch.randint(weight.shape[0], (length,), generator=generator) for length in _LENGTHS]
        tokens[-1][:_NUM_COMMON] = tokens[0][:_NUM_COMMON]
        tokens = [ids.to(weight.device) for ids in tokens]
        logits_V = [causal_lm(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in tokens]
        return cls(tokens=tokens, logits_V=logits_V)

    @torch.no_grad()
    def check(self, base: BaseModel) -> None:
        """Raise Unsupported unless packed passes give the same logits: of each sequence for itself, and with a common prefix."""
        self._compare(base, self.tokens, list(_LENGTHS), [-1, -1, -1], "its family is not supported")
        first, other, last = self.tokens
        pieces = [first[:_NUM_COMMON], first[_NUM_COMMON:], other, last[_NUM_COMMON:]]
        advice = "where sequences have a prefix in common, with this attention; choose another attn_implementation"
        self._compare(base, pieces, [len(ids) for ids in pieces], [-1, 0, -1, 0], advice)

    def _compare(
        self, base: BaseModel, pieces: list[Tensor], lengths: list[int], parents: list[int], advice: str
    ) -> None:
        context = base.packed(lengths, parents)
        hidden_TD = base.hidden(torch.cat(pieces), context.segments.positions, attention=context, adapters=None)
        # The last pieces are the ends of the sequences.
        ends = (torch.tensor(lengths).cumsum(0) - 1)[-len(self.logits_V) :]
        tolerance = _TOLERANCE.get(base.compute_dtype, _HALF_TOLERANCE)
        if base.numerics.attention_cast_bf16:
            tolerance = _HALF_TOLERANCE
        for end, want_V in zip(ends.tolist(), self.logits_V, strict=True):
            got_V = nn.functional.linear(hidden_TD[end], base.head_weight)
            error = float((got_V - want_V).abs().max() / want_V.abs().max())
            if not error <= tolerance:
                raise Unsupported(
                    f"model: {base.facts.architecture} gives other logits through this engine than through transformers "
                    f"(relative error {error:.1e}, allowed {tolerance:.0e}); {advice}"
                )
