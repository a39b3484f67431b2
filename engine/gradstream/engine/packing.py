"""Which sequences share a row, and which rank runs which row; pure functions of lengths."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A datum of a job, both counted in submission order."""

    job: int
    datum: int
    length: int


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences that lie end to end in one forward pass, in submission order; some between them may lie in other rows."""

    placements: tuple[Placement, ...]

    @property
    def num_tokens(self) -> int:
        return sum(placement.length for placement in self.placements)


Packing = Literal["sequential", "best_fit"]


def pack(
    lengths: Sequence[Sequence[int]],
    *,
    budget_tokens: int,
    num_ranks: int = 1,
    isolate_jobs: bool = False,
    packing: Packing = "sequential",
) -> list[Row]:
    """Rows of at most budget_tokens from the datum lengths of each job; a longer datum has a row of its own.

    sequential keeps the order: rows filled one after the other give back all datums job by job. best_fit takes the longest datums
    first, and puts each into the row that has the least room left for it. With several ranks the budget is lowered to an equal
    share, so that each rank gets work. isolate_jobs: the rows of each job are those that it would have alone.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens is {budget_tokens}; it must be at least 1")
    groups = [{job: one} for job, one in enumerate(lengths)] if isolate_jobs else [dict(enumerate(lengths))]
    fill = _sequential if packing == "sequential" else _best_fit
    return [row for group in groups for row in fill(_placements(group), _budget(group, budget_tokens, num_ranks))]


def _placements(lengths: Mapping[int, Sequence[int]]) -> list[Placement]:
    return [
        Placement(job=job, datum=datum, length=length)
        for job, own in lengths.items()
        for datum, length in enumerate(own)
    ]


def _budget(lengths: Mapping[int, Sequence[int]], budget_tokens: int, num_ranks: int) -> int:
    total = sum(map(sum, lengths.values()))
    return min(budget_tokens, -(-total // num_ranks)) if num_ranks > 1 else budget_tokens


def _sequential(placements: Sequence[Placement], budget: int) -> list[Row]:
    rows: list[Row] = []
    open_row: list[Placement] = []
    used = 0
    for placement in placements:
        if open_row and used + placement.length > budget:
            rows.append(Row(tuple(open_row)))
            open_row, used = [], 0
        open_row.append(placement)
        used += placement.length
    if open_row:
        rows.append(Row(tuple(open_row)))
    return rows


def _best_fit(placements: Sequence[Placement], budget: int) -> list[Row]:
    """Rows in the order of their longest datums. Of equal lengths the earlier datum comes first, of equal rooms the earlier row."""
    filled: list[list[Placement]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each row that is not full, and the row; ascending
    # Sorting is stable, so equal lengths keep their order.
    for placement in sorted(placements, key=lambda placement: -placement.length):
        place = bisect_left(rooms, (placement.length, 0))
        if place == len(rooms):
            left, row = budget, len(filled)
            filled.append([])
        else:
            left, row = rooms.pop(place)
        filled[row].append(placement)
        if left > placement.length:
            insort(rooms, (left - placement.length, row))
    return [Row(tuple(sorted(row, key=lambda placement: (placement.job, placement.datum)))) for row in filled]


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
