"""Which datums of a job begin with the same tokens, so that one computation of these serves all of them.

Legend: N tokens of one job.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Piece(NamedTuple):
    """Tokens [start, end) of a datum. All datums with this node have the same tokens there and before."""

    node: int
    start: int
    end: int


# The pieces of one datum in order: they tile it.
Path = tuple[Piece, ...]


def find_prefixes(tokens_N: NDArray[np.int64], lengths: Sequence[int], *, min_tokens: int) -> list[Path] | None:
    """Each datum's pieces, or None where no two datums begin with the same min_tokens tokens; 0 for none in any case.

    A prefix may have several levels: datums that have at least min_tokens more in common than others do share a longer one.
    A pure function of its arguments. tokens_N: the datums end to end.
    """
    if not min_tokens or len(lengths) < 2:
        return None
    ends = list(accumulate(lengths))
    datums = [tokens_N[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    heads = [tokens_D[:min_tokens].tobytes() for tokens_D in datums if len(tokens_D) >= min_tokens]
    if len(set(heads)) == len(heads):
        return None
    # Whatever the order of tokens is in bytes, datums with a common prefix come next to each other.
    order = sorted(range(len(datums)), key=lambda datum: datums[datum].tobytes())
    common = [0, *(_num_common(datums[one], datums[other]) for one, other in pairwise(order))]
    return _paths(order, np.asarray(common), lengths, min_tokens)


def _num_common(one_D: NDArray[np.int64], other_D: NDArray[np.int64]) -> int:
    size = min(len(one_D), len(other_D))
    differences = np.flatnonzero(one_D[:size] != other_D[:size])
    return int(differences[0]) if differences.size else size


def _paths(order: Sequence[int], common: NDArray[np.int64], lengths: Sequence[int], min_tokens: int) -> list[Path]:
    """common: for each datum in this order, the tokens that it shares with the one before it."""
    paths: list[list[Piece]] = [[] for _ in lengths]
    num_nodes = 0
    # Stretches [first, last) of the order whose datums have the first `depth` tokens in nodes already.
    work = [(0, len(order), 0)]
    while work:
        first, last, depth = work.pop()
        own = order[first:last]
        end = lengths[own[0]] if len(own) == 1 else int(common[first + 1 : last].min())
        if end - depth >= (1 if len(own) == 1 else min_tokens):
            for datum in own:
                paths[datum].append(Piece(num_nodes, depth, end))
            num_nodes += 1
            depth = end
        if len(own) > 1:
            cuts = [first, *(first + 1 + np.flatnonzero(common[first + 1 : last] == end)).tolist(), last]
            work.extend((start, stop, depth) for start, stop in pairwise(cuts))
    return [tuple(path) for path in paths]
