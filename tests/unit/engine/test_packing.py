"""Rows keep within the budget and lose nothing; filled one after the other they keep order too."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.engine.packing import Packing, assign, pack

PACKINGS = st.sampled_from(["sequential", "best_fit"])
JOBS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=6)


@given(JOBS, st.integers(1, 120), st.integers(1, 4))
def test_rows_hold_every_datum_once_in_order(jobs: list[list[int]], budget: int, ranks: int) -> None:
    rows = pack(jobs, budget_tokens=budget, num_ranks=ranks)
    placed = [(p.job, p.datum, p.length) for row in rows for p in row.placements]
    assert placed == [(j, d, length) for j, job in enumerate(jobs) for d, length in enumerate(job)]


@given(JOBS, st.integers(1, 120), st.integers(1, 4))
def test_best_fit_rows_hold_every_datum_once_each_row_in_order(jobs: list[list[int]], budget: int, ranks: int) -> None:
    rows = pack(jobs, budget_tokens=budget, num_ranks=ranks, packing="best_fit")
    placed = [[(p.job, p.datum, p.length) for p in row.placements] for row in rows]
    assert all(row == sorted(row) for row in placed)
    assert sorted(chain(*placed)) == [(j, d, length) for j, job in enumerate(jobs) for d, length in enumerate(job)]


@given(JOBS, st.integers(1, 120), st.integers(1, 4))
def test_in_best_fit_a_row_begins_only_where_no_earlier_one_has_room(
    jobs: list[list[int]], budget: int, ranks: int
) -> None:
    rows = pack(jobs, budget_tokens=budget, num_ranks=ranks, packing="best_fit")
    share = min(budget, -(-sum(map(sum, jobs)) // ranks))
    for number, row in enumerate(rows):
        longest = max(p.length for p in row.placements)
        for earlier in rows[:number]:
            before = sum(p.length for p in earlier.placements if p.length >= longest)
            assert before + longest > share


def test_best_fit_puts_uneven_lengths_into_fewer_rows() -> None:
    lengths = [[50, 60, 50, 40], [70, 30]]
    rows = {name: pack(lengths, budget_tokens=100, packing=name) for name in ("sequential", "best_fit")}
    assert (len(rows["sequential"]), len(rows["best_fit"])) == (4, 3)
    assert all(row.num_tokens == 100 for row in rows["best_fit"])
    assert [[p.datum for p in row.placements] for row in rows["best_fit"]] == [[0, 1], [1, 3], [0, 2]]


@given(JOBS, st.integers(1, 120), st.integers(1, 4), PACKINGS)
def test_only_a_single_long_datum_exceeds_the_budget(
    jobs: list[list[int]], budget: int, ranks: int, packing: Packing
) -> None:
    for row in pack(jobs, budget_tokens=budget, num_ranks=ranks, packing=packing):
        assert row.num_tokens <= budget or len(row.placements) == 1


@given(JOBS, st.integers(1, 120), st.integers(1, 4), PACKINGS)
def test_every_row_has_one_rank(jobs: list[list[int]], budget: int, ranks: int, packing: Packing) -> None:
    rows = pack(jobs, budget_tokens=budget, num_ranks=ranks, packing=packing)
    owners = assign(rows, num_ranks=ranks)
    assert len(owners) == len(rows)
    assert all(0 <= owner < ranks for owner in owners)


def test_equal_rows_are_spread_evenly() -> None:
    rows = pack([[10] * 8], budget_tokens=1000, num_ranks=4)
    owners = assign(rows, num_ranks=4)
    assert sorted(owners.count(rank) for rank in range(4)) == [1, 1, 1, 1]


def test_a_budget_below_one_is_a_callers_mistake() -> None:
    with pytest.raises(ValueError, match="budget_tokens is 0"):
        pack([[1]], budget_tokens=0)


@given(JOBS, st.integers(1, 120), st.integers(1, 4), PACKINGS)
def test_an_isolated_job_has_the_rows_and_the_ranks_that_it_has_alone(
    jobs: list[list[int]], budget: int, ranks: int, packing: Packing
) -> None:
    rows = pack(jobs, budget_tokens=budget, num_ranks=ranks, isolate_jobs=True, packing=packing)
    owners = assign(rows, num_ranks=ranks, isolate_jobs=True)
    for number, job in enumerate(jobs):
        alone = pack([job], budget_tokens=budget, num_ranks=ranks, isolate_jobs=True, packing=packing)
        together = [
            (len(row.placements), row.num_tokens, owner)
            for row, owner in zip(rows, owners, strict=True)
            if row.placements[0].job == number
        ]
        expected = zip(alone, assign(alone, num_ranks=ranks, isolate_jobs=True), strict=True)
        assert together == [(len(row.placements), row.num_tokens, owner) for row, owner in expected]
