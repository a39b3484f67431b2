"""Common prefixes of datums are found, and rows compute each of them once."""

from itertools import chain, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.engine.bundles import MAX_DATUMS
from gradstream.engine.packing import Packing, Row, Sharing, assign, pack
from gradstream.engine.prefixes import Path, find_prefixes

pytestmark = pytest.mark.config_field("shared_prompt_tokens")

# Few kinds of token, so that datums often begin alike.
JOB = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8)
JOBS = st.lists(JOB, min_size=1, max_size=3)
LEAST = st.integers(1, 4)
PACKINGS = st.sampled_from(["sequential", "best_fit"])


def paths_of(job: list[list[int]], least: int) -> list[Path] | None:
    return find_prefixes(np.array(list(chain(*job))), [len(tokens) for tokens in job], min_tokens=least)


def rows_of(
    jobs: list[list[list[int]]], least: int, *, num_candidates: list[int] | None = None, **options: object
) -> list[Row]:
    lengths = [[len(tokens) for tokens in job] for job in jobs]
    sharing = Sharing(paths=[paths_of(job, least) for job in jobs], num_candidates=num_candidates or [1 for _ in jobs])
    return pack(lengths, sharing=sharing, **options)  # type: ignore[arg-type]


@given(JOB, LEAST)
def test_pieces_tile_each_datum_and_a_node_has_one_content(job: list[list[int]], least: int) -> None:
    paths = paths_of(job, least)
    if paths is None:
        return
    contents = {}
    for tokens, path in zip(job, paths, strict=True):
        assert [piece.start for piece in path] == [0, *(piece.end for piece in path[:-1])]
        assert path[-1].end == len(tokens)
        for piece in path:
            assert contents.setdefault(piece.node, tokens[: piece.end]) == tokens[: piece.end]
            assert piece.end > piece.start


@given(JOB, LEAST)
def test_two_datums_share_what_they_have_in_common_but_for_less_than_the_least(
    job: list[list[int]], least: int
) -> None:
    paths = paths_of(job, least) or [()] * len(job)
    for one, own in zip(job, paths, strict=True):
        for other, others in zip(job, paths, strict=True):
            if one is other:
                continue
            common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
            shared = max((piece.end for piece in own if piece in others), default=0)
            assert shared <= common < shared + least or common < least


@given(JOB)
def test_nothing_is_shared_where_that_is_off(job: list[list[int]]) -> None:
    assert paths_of(job, 0) is None


def test_a_prefix_has_levels_where_each_is_worth_it() -> None:
    system, ask, tell = [1] * 5, [2] * 4, [3] * 4
    job = [[*system, *ask, 7], [*system, *tell, 8], [*system, *ask, 9], [*system, *tell, 7]]
    paths = paths_of(job, 4)
    assert paths is not None
    assert [[(piece.start, piece.end) for piece in path] for path in paths] == [[(0, 5), (5, 9), (9, 10)]] * 4
    assert len({path[0].node for path in paths}) == 1
    assert paths[0][1] == paths[2][1] != paths[1][1] == paths[3][1]
    (row,) = rows_of([job], 4, budget_tokens=99)
    assert row.layout is not None
    assert row.layout.lengths == [5, 4, 1, 4, 1, 1, 1]
    assert row.layout.parents == [-1, 0, 1, 0, 3, 1, 3]


@given(JOBS, LEAST, st.integers(1, 60), st.integers(1, 4), PACKINGS)
def test_a_row_computes_the_tokens_of_its_datums_behind_what_comes_before_them(
    jobs: list[list[list[int]]], least: int, budget: int, ranks: int, packing: Packing
) -> None:
    rows = rows_of(jobs, least, budget_tokens=budget, num_ranks=ranks, packing=packing)
    placed = sorted((p.job, p.datum) for row in rows for p in row.placements)
    assert placed == [(number, datum) for number, job in enumerate(jobs) for datum in range(len(job))]
    for row in rows:
        layout = row.layout
        if layout is None:
            continue
        tokens = np.array([token for p in row.placements for token in jobs[p.job][p.datum]])
        computed = tokens[layout.source_of_computed()]
        assert (computed[layout.computed_of_source()] == tokens).all()
        ends = np.cumsum(layout.lengths)
        segment_of = np.searchsorted(ends, layout.computed_of_source(), side="right")
        at = 0
        for p in row.placements:
            chain_of_datum = list(dict.fromkeys(segment_of[at : at + p.length].tolist()))
            assert [layout.parents[one] for one in chain_of_datum] == [-1, *chain_of_datum[:-1]]
            assert sum(layout.lengths[one] for one in chain_of_datum) == p.length
            at += p.length
        places = list(zip(layout.computed_of_source().tolist(), layout.slots().tolist(), strict=True))
        assert len(set(places)) == len(places)
        assert layout.num_slots == 1 + max(slot for _, slot in places)


@given(JOBS, LEAST, st.integers(1, 60), st.integers(1, 4), PACKINGS)
def test_computed_tokens_keep_within_the_budget_but_for_a_single_datum(
    jobs: list[list[list[int]]], least: int, budget: int, ranks: int, packing: Packing
) -> None:
    for row in rows_of(jobs, least, budget_tokens=budget, num_ranks=ranks, packing=packing):
        assert row.num_tokens <= budget or len(row.placements) == 1


@given(JOBS, LEAST, st.integers(1, 60), st.integers(1, 4), PACKINGS)
def test_an_isolated_job_is_laid_out_as_alone(
    jobs: list[list[list[int]]], least: int, budget: int, ranks: int, packing: Packing
) -> None:
    options = {"budget_tokens": budget, "num_ranks": ranks, "packing": packing, "isolate_jobs": True}
    rows = rows_of(jobs, least, **options)
    owners = assign(rows, num_ranks=ranks, isolate_jobs=True)
    for number, job in enumerate(jobs):
        alone = rows_of([job], least, **options)
        together = [
            (row.layout, owner) for row, owner in zip(rows, owners, strict=True) if row.placements[0].job == number
        ]
        expected = zip(alone, assign(alone, num_ranks=ranks, isolate_jobs=True), strict=True)
        assert together == [(row.layout, owner) for row, owner in expected]


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
def test_completions_of_prompts_that_take_turns_are_brought_together(packing: Packing) -> None:
    prompts = ([1] * 20, [2] * 20)
    job = [[*prompts[number % 2], 3 + number] for number in range(8)]
    rows = rows_of([job], 8, budget_tokens=24, packing=packing)
    assert [[p.datum for p in row.placements] for row in rows] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [row.num_tokens for row in rows] == [24, 24]


def test_a_group_beyond_the_budget_computes_its_prompt_once_in_each_row() -> None:
    job = [[*[1] * 20, 3 + number] for number in range(6)]
    rows = rows_of([job], 8, budget_tokens=23)
    assert [row.num_tokens for row in rows] == [23, 23]


def test_the_ranks_get_equal_parts_of_a_group() -> None:
    job = [[*[1] * 20, *[3 + number] * 10] for number in range(8)]
    rows = rows_of([job], 8, budget_tokens=999, num_ranks=2)
    assert [row.num_tokens for row in rows] == [60, 60]


def test_a_token_is_shared_by_a_bounded_number_of_datums() -> None:
    job = [[1, 1, number] for number in range(2 * MAX_DATUMS + 1)]
    (row,) = rows_of([job], 2, budget_tokens=999)
    assert row.layout is not None
    assert row.layout.num_slots == MAX_DATUMS
    assert row.num_tokens == len(job) + 3 * 2


@pytest.mark.parametrize(("candidates", "num_slots"), [(1, 64), (8, 64), (16, 32), (256, 2), (4096, 2)])
@pytest.mark.parametrize("isolate_jobs", [True, False])
def test_the_more_candidates_tokens_of_a_row_have_the_fewer_datums_share_one(
    candidates: int, num_slots: int, isolate_jobs: bool
) -> None:
    job = [[1, 1, number] for number in range(200)]
    rows = rows_of([job, job], 2, budget_tokens=4000, num_candidates=[candidates, 1], isolate_jobs=isolate_jobs)
    layouts = [row.layout for row in rows]
    assert [None if layout is None else layout.num_slots for layout in layouts] == (
        [num_slots, MAX_DATUMS] if isolate_jobs else [num_slots]
    )


def test_hundreds_of_datums_each_longer_than_the_one_before_are_laid_out() -> None:
    job = [[1] * size for size in range(1, 400)]
    paths = paths_of(job, 1)
    assert paths is not None
    assert len(paths[-1]) == len(job)
