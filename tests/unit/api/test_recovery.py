"""When a look-up that found nothing may be believed."""

import pytest

from gradstream.api.recovery import Recovery
from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import InvalidRequest, SequenceConflict, Unavailable, UnknownModel


class Queue:
    """An intake of which only the leader is asked."""

    def __init__(self) -> None:
        self.epoch: int | None = None

    async def leading(self) -> int | None:
        return self.epoch


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def recovery(queue: Queue, clock: ManualClock) -> Recovery:
    return Recovery(queue, clock=clock)  # type: ignore[arg-type]


async def test_nothing_is_settled_while_nobody_leads(recovery: Recovery, clock: ManualClock) -> None:
    assert not await recovery.is_settled(clock.monotonic_s())


async def test_a_look_up_under_a_gang_that_led_before_and_after_is_settled(
    recovery: Recovery, queue: Queue, clock: ManualClock
) -> None:
    queue.epoch = 3
    await recovery.look()
    clock.advance(1.0)
    assert await recovery.is_settled(clock.monotonic_s())


@pytest.mark.parametrize("between", [None, 4])
async def test_a_look_up_during_which_the_leader_changed_is_not_settled(
    recovery: Recovery, queue: Queue, clock: ManualClock, between: int | None
) -> None:
    queue.epoch = 3
    await recovery.look()
    clock.advance(1.0)
    start_s = clock.monotonic_s()
    clock.advance(1.0)
    queue.epoch = between
    assert not await recovery.is_settled(start_s)
    queue.epoch = 5
    assert not await recovery.is_settled(start_s)
    clock.advance(1.0)
    assert await recovery.is_settled(clock.monotonic_s())


@pytest.mark.parametrize("error", [UnknownModel("no"), SequenceConflict("no")])
async def test_doubtful_errors_become_unavailable(recovery: Recovery, error: UnknownModel | SequenceConflict) -> None:
    with pytest.raises(Unavailable, match="recovering"):
        await recovery.check(error, since_s=0.0)


async def test_other_errors_stay_as_they_are(recovery: Recovery) -> None:
    await recovery.check(InvalidRequest("no"), since_s=0.0)
