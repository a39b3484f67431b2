"""When a gang counts as one that stands still."""

from gradstream.shared.clock import ManualClock
from gradstream.worker.engine_watch import Leaderless, Sight

LED, UNLED = Sight(epoch=1, lease_owner="launcher-1"), Sight(epoch=1)


def test_a_gang_whose_lease_stays_away_is_overdue_after_the_limit() -> None:
    clock = ManualClock()
    leaderless = Leaderless(limit_s=6.0, clock=clock)
    assert not leaderless.is_overdue(UNLED, should_lead=True)
    clock.advance(5.9)
    assert not leaderless.is_overdue(UNLED, should_lead=True)
    clock.advance(0.1)
    assert leaderless.is_overdue(UNLED, should_lead=True)


def test_a_lease_a_redis_outage_and_a_gang_that_starts_begin_the_count_anew() -> None:
    for sight, should_lead in ((LED, True), (None, True), (UNLED, False)):
        clock = ManualClock()
        leaderless = Leaderless(limit_s=6.0, clock=clock)
        assert not leaderless.is_overdue(UNLED, should_lead=True)
        clock.advance(5.0)
        assert not leaderless.is_overdue(sight, should_lead=should_lead)
        clock.advance(5.0)
        assert not leaderless.is_overdue(UNLED, should_lead=True)
        clock.advance(5.9)
        assert not leaderless.is_overdue(UNLED, should_lead=True)
