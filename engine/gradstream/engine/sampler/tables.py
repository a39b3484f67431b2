"""Tables of the likeliest tokens at each of several positions."""

# Shape letters: N positions, V vocabulary, k candidates.

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# What an empty cell holds, as clients expect it.
EMPTY_TOKEN = 0
EMPTY_LOGPROB = -99999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKTable:
    """k candidates at each of N positions, likeliest first: token_ids int32 [N, k] and logprobs float32 [N, k]."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]

    def row(self, index: int, *, width: int) -> "TopKTable":
        """The first width candidates of one position, as a table of one row."""
        return TopKTable(
            token_ids=self.token_ids[index : index + 1, :width], logprobs=self.logprobs[index : index + 1, :width]
        )


def empty_table(*, num_rows: int, width: int) -> TopKTable:
    """A table without candidates."""
    return TopKTable(
        token_ids=np.full((num_rows, width), EMPTY_TOKEN, dtype=np.int32),
        logprobs=np.full((num_rows, width), EMPTY_LOGPROB, dtype=np.float32),
    )


def topk_table(logprobs_NV: Tensor, *, width: int) -> TopKTable:
    """The width likeliest tokens of each row of log-probabilities; cells past the vocabulary are empty."""
    table = empty_table(num_rows=logprobs_NV.shape[0], width=width)
    found = min(width, logprobs_NV.shape[1])
    values_Nk, ids_Nk = logprobs_NV.topk(found, dim=-1)
    table.token_ids[:, :found] = ids_Nk.cpu().numpy()
    table.logprobs[:, :found] = values_Nk.cpu().numpy()
    return table


def join_tables(tables: list[TopKTable]) -> TopKTable:
    """The rows of tables of one width, one after the other."""
    return TopKTable(
        token_ids=np.concatenate([table.token_ids for table in tables]),
        logprobs=np.concatenate([table.logprobs for table in tables]),
    )
