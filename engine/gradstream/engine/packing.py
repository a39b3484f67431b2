"""Which sequences share a row, and which rank runs which row; pure functions of lengths and common prefixes."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from gradstream.engine.bundles import Bundle, Placement, bundle, most_datums, num_computed, num_shared
from gradstream.engine.prefixes import Path, Piece
from gradstream.engine.row_layout import RowLayout, lay_out


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences that lie end to end in one forward pass, in submission order; some between them may lie in other rows.

    layout: what is computed for them where some tokens serve several; None where each token serves one.
    """

    placements: tuple[Placement, ...]
    layout: RowLayout | None = None

    @property
    def num_tokens(self) -> int:
        """How many are computed."""
        if self.layout is not None:
            return self.layout.num_tokens
        return sum(placement.length for placement in self.placements)


Packing = Literal["sequential", "best_fit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """What the datums of each job may share.

    paths: their pieces (`prefixes.find_prefixes`), None where nothing is shared. num_candidates: targets per token.
    """

    paths: Sequence[Sequence[Path] | None]
    num_candidates: Sequence[int]


def pack(
    lengths: Sequence[Sequence[int]],
    *,
    budget_tokens: int,
    num_ranks: int = 1,
    isolate_jobs: bool = False,
    packing: Packing = "sequential",
    sharing: Sharing | None = None,
) -> list[Row]:
    """Rows of at most budget_tokens from the datum lengths of each job; a longer datum has a row of its own.

    sequential keeps the order: rows filled one after the other give back all datums job by job. best_fit takes the longest datums
    first, and puts each into the row that has the least room left for it. With several ranks the budget is lowered to an equal
    share, so that each rank gets work. isolate_jobs: the rows of each job are those that it would have alone.

    sharing: None where no two datums share tokens. Those that do go into a row together, as one item in the place of the first, as far as
    the budget reaches; a row's tokens are those that are computed. Where tokens have many candidates, fewer datums share one.
    """
    if budget_tokens < 1:
        raise ValueError(f"budget_tokens is {budget_tokens}; it must be at least 1")
    jobs = {job: _job_paths(own, None if sharing is None else sharing.paths[job]) for job, own in enumerate(lengths)}
    groups = [{job: own} for job, own in jobs.items()] if isolate_jobs else [jobs]
    fill = _sequential if packing == "sequential" else _best_fit
    rows = []
    for group in groups:
        budget = _budget(group, budget_tokens, num_ranks)
        # A row is as wide as its widest job.
        most = 1 if sharing is None else most_datums(max(sharing.num_candidates[job] for job in group))
        bundles = [part for job, own in group.items() for part in bundle(job, own, budget, max_datums=most)]
        rows += [_row(own, jobs) for own in fill(bundles, budget)]
    return rows


def _job_paths(lengths: Sequence[int], paths: Sequence[Path] | None) -> Sequence[Path]:
    return [(Piece(datum, 0, length),) for datum, length in enumerate(lengths)] if paths is None else paths


def _budget(jobs: Mapping[int, Sequence[Path]], budget_tokens: int, num_ranks: int) -> int:
    if num_ranks == 1:
        return budget_tokens
    # Datums that share tokens are computed on several ranks only with these tokens on each.
    total = sum(map(num_computed, jobs.values())) + (num_ranks - 1) * max(map(num_shared, jobs.values()))
    return min(budget_tokens, -(-total // num_ranks))


def _row(bundles: Sequence[Bundle], jobs: Mapping[int, Sequence[Path]]) -> Row:
    items = sorted(
        ((placement, number) for number, part in enumerate(bundles) for placement in part.placements),
        key=lambda item: (item[0].job, item[0].datum),
    )
    placements = tuple(placement for placement, _ in items)
    if len(bundles) == len(placements):
        return Row(placements)
    by_job = groupby(items, key=lambda item: item[0].job)
    return Row(placements, lay_out([(number, jobs[job][one.datum]) for one, number in own] for job, own in by_job))


def _sequential(bundles: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    rows: list[list[Bundle]] = []
    used = 0
    for part in bundles:
        if not rows or used + part.num_tokens > budget:
            rows.append([])
            used = 0
        rows[-1].append(part)
        used += part.num_tokens
    return rows


def _best_fit(bundles: Sequence[Bundle], budget: int) -> list[list[Bundle]]:
    """Rows in the order of their longest bundles. Of equal lengths the earlier one comes first, of equal rooms the earlier row."""
    filled: list[list[Bundle]] = []
    rooms: list[tuple[int, int]] = []  # what is left of each row that is not full, and the row; ascending
    # Sorting is stable, so equal lengths keep their order.
    for part in sorted(bundles, key=lambda part: -part.num_tokens):
        place = bisect_left(rooms, (part.num_tokens, 0))
        if place == len(rooms):
            left, row = budget, len(filled)
            filled.append([])
        else:
            left, row = rooms.pop(place)
        filled[row].append(part)
        if left > part.num_tokens:
            insort(rooms, (left - part.num_tokens, row))
    return filled


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
