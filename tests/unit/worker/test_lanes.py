"""Training and sampling get the same time while both have work."""

from itertools import cycle, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstream.worker.fairness import Lane
from gradstream.worker.lanes import Lanes

BOTH = (Lane.TRAIN, Lane.SAMPLE)


def run(lanes: Lanes, seconds: float, *, wanted: tuple[Lane, ...] = BOTH) -> Lane:
    """One turn that takes this long."""
    lane = lanes.choose(wanted)
    assert lane is not None
    lanes.take(lane, wanted)
    lanes.ran(seconds)
    return lane


def turns(lanes: Lanes, costs: dict[Lane, float], count: int) -> list[Lane]:
    """Turns of which each lane's take as long as said."""
    ran = []
    for _ in range(count):
        lane = lanes.choose(BOTH)
        assert lane is not None
        ran.append(run(lanes, costs[lane]))
    return ran


def test_nothing_runs_where_nothing_waits_and_a_lane_alone_always_runs():
    lanes = Lanes()
    assert lanes.choose(()) is None
    assert [run(lanes, 5.0, wanted=(Lane.SAMPLE,)) for _ in range(3)] == [Lane.SAMPLE] * 3


def test_turns_of_equal_length_alternate():
    ran = turns(Lanes(), {Lane.TRAIN: 0.25, Lane.SAMPLE: 0.25}, 6)
    assert ran in ([Lane.TRAIN, Lane.SAMPLE] * 3, [Lane.SAMPLE, Lane.TRAIN] * 3)


def test_four_slices_run_for_a_batch_that_takes_four_times_as_long():
    ran = turns(Lanes(last=Lane.SAMPLE), {Lane.TRAIN: 0.5, Lane.SAMPLE: 0.125}, 50)
    assert ran.count(Lane.SAMPLE) == 4 * ran.count(Lane.TRAIN)


@pytest.mark.parametrize(("heavy", "light"), [BOTH, BOTH[::-1]])
def test_after_a_very_long_turn_the_other_lane_runs_for_a_second_at_most(heavy: Lane, light: Lane):
    lanes = Lanes(last=light)
    assert run(lanes, 60.0) is heavy
    assert [run(lanes, 0.25) for _ in range(5)] == [*[light] * 4, heavy]


def test_of_what_a_lane_did_alone_only_the_turn_in_which_the_other_came_is_held_against_it():
    lanes = Lanes()
    for _ in range(10):
        run(lanes, 0.3, wanted=(Lane.TRAIN,))
    assert [run(lanes, 0.25) for _ in range(3)] == [Lane.SAMPLE, Lane.SAMPLE, Lane.TRAIN]


def test_a_lane_whose_work_ends_gives_up_what_it_was_behind():
    lanes = Lanes(last=Lane.SAMPLE)
    run(lanes, 0.9)
    run(lanes, 0.1, wanted=(Lane.TRAIN,))
    assert run(lanes, 0.1) is Lane.SAMPLE
    assert run(lanes, 0.1) is Lane.TRAIN


def test_what_training_did_alone_is_forgotten_when_sampling_comes_after_its_end():
    lanes = Lanes()
    run(lanes, 0.9, wanted=(Lane.TRAIN,))
    run(lanes, 0.1, wanted=(Lane.SAMPLE,))
    assert [run(lanes, 0.1) for _ in range(2)] == [Lane.TRAIN, Lane.SAMPLE]


def test_where_samples_begin_all_the_time_training_gets_every_other_turn():
    lanes = Lanes(last=Lane.TRAIN)
    ran = []
    for _ in range(20):
        lane = lanes.choose(BOTH, is_joining=True)
        assert lane is not None
        lanes.take(lane, BOTH)
        lanes.ran(0.5 if lane is Lane.SAMPLE else 0.05)
        ran.append(lane)
    assert all(Lane.TRAIN in pair for pair in pairwise(ran))


def test_a_sample_that_begins_waits_for_one_batch_of_training_whatever_sampling_took_before():
    lanes = Lanes(last=Lane.TRAIN)
    assert run(lanes, 0.9) is Lane.SAMPLE
    assert lanes.choose(BOTH, is_joining=True) is Lane.TRAIN
    assert run(lanes, 0.1) is Lane.TRAIN
    assert lanes.choose(BOTH, is_joining=True) is Lane.SAMPLE
    assert [run(lanes, 0.1) for _ in range(3)] == [Lane.TRAIN] * 3


@given(st.lists(st.floats(0.001, 0.9), min_size=1, max_size=5), st.lists(st.floats(0.001, 0.9), min_size=1, max_size=5))
def test_neither_lane_is_ever_ahead_by_more_than_its_longest_turn(train: list[float], sample: list[float]):
    lanes, costs = Lanes(), {Lane.TRAIN: cycle(train), Lane.SAMPLE: cycle(sample)}
    served = {Lane.TRAIN: 0.0, Lane.SAMPLE: 0.0}
    for _ in range(100):
        lane = lanes.choose(BOTH)
        assert lane is not None
        seconds = next(costs[lane])
        run(lanes, seconds)
        served[lane] += seconds
        assert served[Lane.TRAIN] - served[Lane.SAMPLE] <= max(train) + 1e-9
        assert served[Lane.SAMPLE] - served[Lane.TRAIN] <= max(sample) + 1e-9
