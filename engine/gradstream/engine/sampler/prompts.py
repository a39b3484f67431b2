"""What the model thinks of a prompt's positions: of its own tokens, of others, and what it would have said itself.

Log-probabilities are those at temperature 1; only the drawing of alternatives uses the request's temperature.
"""

# Shape letters: T prompt tokens, N positions of a chunk, D hidden, V vocabulary, k draws.

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.head import CHUNK_BYTES, logits, target_logprobs
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.choice import Choice, draw, scaled_logprobs, uniform
from gradstream.engine.sampler.request import PromptQuestions, PromptScores
from gradstream.engine.sampler.tables import TopKTable, empty_table, join_tables, topk_table
from gradstream.shared.targets import NO_TOKEN, Cells

# Draws of one position have numbers of their own, so that more draws begin with the same tokens.
_MAX_DRAWS = 1 << 16


@dataclass(slots=True)
class _Parts:
    """Answers of the chunks so far, in order of position."""

    topk: list[TopKTable] = field(default_factory=list)
    targets: list[NDArray[np.float32]] = field(default_factory=list)
    drawn: list[TopKTable] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PromptScorer:
    """Answers the questions about one prompt. The position of row i is i + 1: what the model says after i + 1 tokens."""

    base: BaseModel
    adapter: LoraWeights | None
    questions: PromptQuestions
    choice: Choice

    def scores(self, hidden_TD: Tensor, tokens_T: Tensor) -> PromptScores:
        """hidden_TD: final hidden states of the prompt tokens_T."""
        asked, num_rows = self.questions, len(tokens_T) - 1
        first_row = 0 if asked.last_n is None else num_rows - asked.last_n
        logprobs = self._own(hidden_TD, tokens_T, first_row=first_row) if asked.logprobs else None
        if not asked.need_logits:
            return PromptScores(logprobs=logprobs)
        parts = self._parts(hidden_TD[:-1], first_row=first_row)
        topk = drawn = targets = None
        if asked.topk:
            topk = join_tables([empty_table(num_rows=1 + first_row, width=asked.topk), *parts.topk])
        if asked.num_drawn:
            drawn = join_tables([empty_table(num_rows=0, width=asked.num_drawn), *parts.drawn])
        if asked.targets is not None:
            targets = np.concatenate([np.empty(0, dtype=np.float32), *parts.targets])
        return PromptScores(logprobs=logprobs, topk=topk, targets=targets, drawn=drawn)

    def _own(self, hidden_TD: Tensor, tokens_T: Tensor, *, first_row: int) -> NDArray[np.float32]:
        """float32 [T]: log-probability of each token given those before it, by the trainer's own path."""
        scored = np.full(len(tokens_T), np.nan, dtype=np.float32)
        num_scored = len(tokens_T) - 1 - first_row
        if num_scored:
            adapters = self.base.adapter_pass([(0, num_scored, self.adapter)])
            logprobs_N = target_logprobs(self.base, hidden_TD[first_row:-1], tokens_T[first_row + 1 :], adapters)
            scored[first_row + 1 :] = logprobs_N.cpu().numpy()
        return scored

    def _parts(self, hidden_ND: Tensor, *, first_row: int) -> _Parts:
        """Everything that needs all logits of a position, in chunks that bound their memory."""
        asked, parts = self.questions, _Parts()
        num_chunk_rows = max(1, CHUNK_BYTES // (4 * self.base.vocab_size))
        needs_all = asked.targets is not None or asked.num_drawn
        for start in range(0 if needs_all else first_row, len(hidden_ND), num_chunk_rows):
            chunk_ND = hidden_ND[start : start + num_chunk_rows]
            logits_NV = logits(self.base, chunk_ND, self.base.adapter_pass([(0, len(chunk_ND), self.adapter)]))
            logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
            if asked.topk:
                parts.topk.append(topk_table(logprobs_NV[max(0, first_row - start) :], width=asked.topk))
            if asked.targets is not None:
                parts.targets.append(_scored(logprobs_NV, asked.targets, start=start))
            if asked.num_drawn:
                parts.drawn.append(self._drawn(logits_NV, logprobs_NV, start=start))
        return parts

    def _drawn(self, logits_NV: Tensor, logprobs_NV: Tensor, *, start: int) -> TopKTable:
        asked = self.questions
        uniforms_Nk = torch.tensor(
            [
                [uniform(asked.key, row * _MAX_DRAWS + index) for index in range(asked.num_drawn)]
                for row in range(start, start + len(logits_NV))
            ],
            dtype=torch.float64,
            device=logits_NV.device,
        )
        tokens_Nk = draw(scaled_logprobs(logits_NV, [self.choice] * len(logits_NV)), self.choice, uniforms_Nk)
        return TopKTable(
            token_ids=tokens_Nk.cpu().numpy().astype(np.int32), logprobs=logprobs_NV.gather(1, tokens_Nk).cpu().numpy()
        )


def _scored(logprobs_NV: Tensor, targets: Cells, *, start: int) -> NDArray[np.float32]:
    """The log-probabilities of the cells whose rows are start .. start + N."""
    first, end = np.searchsorted(targets.rows, [start, start + len(logprobs_NV)])
    token_ids = targets.token_ids[first:end]
    rows = torch.from_numpy(targets.rows[first:end] - start).to(logprobs_NV.device)
    found = logprobs_NV[rows, torch.from_numpy(np.maximum(token_ids, 0)).to(logprobs_NV.device)]
    return np.where(token_ids == NO_TOKEN, np.float32(0.0), found.cpu().numpy())
