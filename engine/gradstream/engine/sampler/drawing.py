"""The next token of each of several sequences, from their logits."""

# Shape letters: N sequences of a step, V vocabulary.

import math
from collections.abc import Sequence as Several
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.sampler.choice import choose, scaled_logits
from gradstream.engine.sampler.request import Sequence
from gradstream.engine.sampler.tables import TopKTable, topk_table
from gradstream.shared.errors import NonFinite


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One token for each of N sequences, with its log-probability, and a row of candidates where any of the sequences wants some."""

    tokens: list[int]
    logprobs: list[float]
    table: TopKTable | None

    def give(self, sequences: Several[Sequence]) -> None:
        """Append each sequence's token to it; one whose row is not finite fails its request."""
        for row, (sequence, token, logprob) in enumerate(zip(sequences, self.tokens, self.logprobs, strict=True)):
            wanted = sequence.owner.request.topk_sample
            if math.isfinite(logprob):
                candidates = self.table.row(row, width=wanted) if self.table and wanted else None
                sequence.append(token, logprob, candidates)
            else:
                sequence.owner.error = NonFinite(
                    f"the sampler's logits are not finite after {sequence.num_cached + 1} tokens; its weights are unusable"
                )


class Drawing:
    """Draws tokens; keeps the memory for probabilities, since pages of a fresh tensor cost more than what is written to them."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def clear(self) -> None:
        """Give the memory back."""
        self._scratch = torch.empty(0)

    def draw(self, sequences: Several[Sequence], logits_NV: Tensor) -> Drawn:
        """The sequences' next tokens; changes none of them."""
        choices = [sequence.owner.request.choice for sequence in sequences]
        logits_NV = scaled_logits(logits_NV, choices)
        probs_NV = self._softmax(logits_NV)
        tokens_N = choose(probs_NV, choices, [sequence.uniform() for sequence in sequences])
        # A row that is not finite has no probabilities either. One transfer for both.
        chosen_N = torch.stack([tokens_N.double(), probs_NV.gather(-1, tokens_N[:, None])[:, 0].log().double()])
        tokens, logprobs = chosen_N.tolist()
        width = max(sequence.owner.request.topk_sample for sequence in sequences)
        return Drawn(
            tokens=[int(token) for token in tokens],
            logprobs=logprobs,
            table=topk_table(torch.log_softmax(logits_NV, dim=-1), width=width) if width else None,
        )

    def _softmax(self, logits_NV: Tensor) -> Tensor:
        """float32 [N, V], valid until the next call."""
        if self._scratch.numel() < logits_NV.numel():
            self.clear()
            self._scratch = torch.empty_like(logits_NV).flatten()
        probs_NV = self._scratch[: logits_NV.numel()].view_as(logits_NV)
        return torch.softmax(logits_NV, dim=-1, out=probs_NV)
