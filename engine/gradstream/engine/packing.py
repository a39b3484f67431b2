"""Which sequences share a row, and which rank runs which row; pure functions of lengths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A datum of a job, both counted in submission order."""

    job: int
    datum: int
    length: int


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences that lie end to end in one forward pass, in submission order."""

    placements: tuple[Placement, ...]

    @property
    def num_tokens(self) -> int:
        return sum(placement.length for placement in self.placements)


def pack(
    lengths: Sequence[Sequence[int]], *, budget_tokens: int, num_ranks: int = 1, isolate_jobs: bool = False
) -> list[Row]:
    """Rows of at most budget_tokens from the datum lengths of each job; a longer datum has a row of its own.

    Order is kept: rows filled one after the other give back all datums job by job. With several ranks the budget is lowered to
    an equal share, so that each rank gets work. isolate_jobs: the rows of each job are those that it would have alone.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens is {budget_tokens}; it must be at least 1")
    if isolate_jobs:
        return [row for job, one in enumerate(lengths) for row in _rows({job: one}, budget_tokens, num_ranks)]
    return _rows(dict(enumerate(lengths)), budget_tokens, num_ranks)


def _rows(lengths: Mapping[int, Sequence[int]], budget_tokens: int, num_ranks: int) -> list[Row]:
    total = sum(sum(job) for job in lengths.values())
    budget = min(budget_tokens, -(-total // num_ranks)) if num_ranks > 1 else budget_tokens
    rows: list[Row] = []
    open_row: list[Placement] = []
    used = 0
    for job, job_lengths in lengths.items():
        for datum, length in enumerate(job_lengths):
            if open_row and used + length > budget:
                rows.append(Row(tuple(open_row)))
                open_row, used = [], 0
            open_row.append(Placement(job=job, datum=datum, length=length))
            used += length
    if open_row:
        rows.append(Row(tuple(open_row)))
    return rows


def assign(rows: Sequence[Row], *, num_ranks: int, isolate_jobs: bool = False) -> list[int]:
    """The rank of each row: in order, to the rank with the fewest tokens so far, the lowest such rank first.

    isolate_jobs, of rows that were packed so: the tokens of the row's own job count, so that its rows go where they go when it is
    alone. A job of a single row then always runs on rank 0, and small jobs leave the other ranks idle.
    """
    if isolate_jobs:
        jobs = groupby(rows, key=lambda row: row.placements[0].job)
        return [rank for _, own in jobs for rank in _least_loaded(own, num_ranks)]
    return _least_loaded(rows, num_ranks)


def _least_loaded(rows: Iterable[Row], num_ranks: int) -> list[int]:
    loads = [0] * num_ranks
    ranks = []
    for row in rows:
        rank = loads.index(min(loads))
        loads[rank] += row.num_tokens
        ranks.append(rank)
    return ranks
