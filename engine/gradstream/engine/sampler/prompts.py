"""What the model thinks of a prompt's own tokens, at temperature 1."""

# Shape letters: T prompt tokens, D hidden, V vocabulary.

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstream.engine.adapters.adapter import LoraWeights
from gradstream.engine.head import logits, target_logprobs
from gradstream.engine.models.base import BaseModel
from gradstream.engine.sampler.tables import TopKTable, empty_table, join_tables, topk_table

_CHUNK_ROWS = 256


def prompt_logprobs(
    base: BaseModel, hidden_TD: Tensor, tokens_T: Tensor, adapter: LoraWeights | None
) -> NDArray[np.float32]:
    """float32 [T]: log-probability of each token given those before it, by the trainer's own path; NaN for the first."""
    num_scored = len(tokens_T) - 1
    scored = np.full(len(tokens_T), np.nan, dtype=np.float32)
    if num_scored:
        adapters = base.adapter_pass([(0, num_scored, adapter)])
        scored[1:] = target_logprobs(base, hidden_TD[:-1], tokens_T[1:], adapters).cpu().numpy()
    return scored


def prompt_candidates(base: BaseModel, hidden_TD: Tensor, adapter: LoraWeights | None, *, width: int) -> TopKTable:
    """The likeliest tokens for each position of a prompt; the first position has none."""
    tables = [empty_table(num_rows=1, width=width)]
    for start in range(0, len(hidden_TD) - 1, _CHUNK_ROWS):
        chunk_ND = hidden_TD[start : min(start + _CHUNK_ROWS, len(hidden_TD) - 1)]
        logits_NV = logits(base, chunk_ND, base.adapter_pass([(0, len(chunk_ND), adapter)]))
        tables.append(topk_table(torch.log_softmax(logits_NV, dim=-1), width=width))
    return join_tables(tables)
