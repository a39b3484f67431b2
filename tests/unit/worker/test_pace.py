"""When a snapshot is worth its copy, on a clock that is turned by hand."""

from gradstream.shared.clock import ManualClock
from gradstream.worker.pace import MAX_BATCHES, Cadence, Pace


def pace(*, budget_s: float = 60.0) -> tuple[Pace, ManualClock]:
    clock = ManualClock()
    return Pace(Cadence(budget_s=budget_s, idle_s=5.0), clock=clock), clock


def test_a_cut_is_due_when_a_recovery_would_repeat_more_than_the_budget():
    paced, _ = pace()
    paced.ran(has_changed=True, elapsed_s=59.0)
    assert not paced.is_due(has_changed=True)
    paced.ran(has_changed=False, elapsed_s=100.0)
    assert not paced.is_due(has_changed=True)
    paced.ran(has_changed=True, elapsed_s=1.0)
    assert paced.is_due(has_changed=True)
    paced.copied(1.0)
    assert not paced.is_due(has_changed=True)


def test_a_copy_that_stopped_training_long_makes_the_next_one_wait_for_ten_times_that():
    paced, _ = pace()
    paced.copied(7.0)
    paced.ran(has_changed=True, elapsed_s=69.0)
    assert not paced.is_due(has_changed=True)
    paced.ran(has_changed=True, elapsed_s=1.0)
    assert paced.is_due(has_changed=True)


def test_a_budget_of_nothing_is_a_copy_after_every_batch_whatever_it_costs():
    paced, _ = pace(budget_s=0.0)
    paced.copied(1000.0)
    paced.ran(has_changed=True, elapsed_s=0.001)
    assert paced.is_due(has_changed=True)


def test_changed_models_are_copied_in_a_rest():
    paced, clock = pace()
    paced.ran(has_changed=True, elapsed_s=0.1)
    clock.advance(4.9)
    assert not paced.is_due(has_changed=True)
    clock.advance(0.2)
    assert paced.is_due(has_changed=True)
    assert not paced.is_due(has_changed=False)


def test_a_cut_is_due_after_many_batches_that_changed_nothing():
    paced, _ = pace()
    for _ in range(MAX_BATCHES - 1):
        paced.ran(has_changed=False, elapsed_s=1.0)
    assert not paced.is_due(has_changed=False)
    paced.ran(has_changed=False, elapsed_s=1.0)
    assert paced.is_due(has_changed=False)


def test_after_a_failure_the_next_try_waits():
    paced, clock = pace(budget_s=0.0)
    paced.ran(has_changed=True, elapsed_s=1.0)
    paced.failed()
    assert not paced.is_due(has_changed=True)
    clock.advance(10.0)
    assert paced.is_due(has_changed=True)
