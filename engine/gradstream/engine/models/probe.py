"""A short comparison that shows whether our seams compute what transformers computes.

Legend: V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradstream.engine.models.base import BaseModel
from gradstream.shared.errors import Unsupported

_LENGTHS = (7, 5)
# Relative to the largest logit. Half precision differs by rounding order.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 0.1


@dataclass(frozen=True)
class Probe:
    """Two short sequences with the last logits that transformers gives them one by one."""

    tokens: list[Tensor]
    logits_V: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, causal_lm: nn.Module) -> "Probe":
        """Run the untouched model."""
        weight: Tensor = causal_lm.get_parameter("lm_head.weight")
        generator = torch.Generator().manual_seed(0)
        tokens = [
            torch.randint(weight.shape[0], (length,), generator=generator).to(weight.device) for length in _LENGTHS
        ]
        logits_V = [causal_lm(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in tokens]
        return cls(tokens=tokens, logits_V=logits_V)

    @torch.no_grad()
    def check(self, base: BaseModel) -> None:
        """Raise Unsupported unless the packed pass gives the same logits."""
        context = base.packed(list(_LENGTHS))
        hidden_TD = base.hidden(torch.cat(self.tokens), context.segments.positions, attention=context, adapters=None)
        ends = torch.tensor(_LENGTHS).cumsum(0) - 1
        tolerance = _TOLERANCE.get(base.compute_dtype, _HALF_TOLERANCE)
        if base.numerics.attention_cast_bf16:
            tolerance = _HALF_TOLERANCE
        for end, want_V in zip(ends.tolist(), self.logits_V, strict=True):
            got_V = nn.functional.linear(hidden_TD[end], base.head_weight)
            error = float((got_V - want_V).abs().max() / want_V.abs().max())
            if not error <= tolerance:
                raise Unsupported(
                    f"model: {base.facts.architecture} gives other logits through this engine than through transformers "
                    f"(relative error {error:.1e}, allowed {tolerance:.0e}); its family is not supported"
                )
