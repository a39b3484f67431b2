"""Followers hear from rank 0 while it is busy alone before it serves."""

import threading

import pytest

from gradstream.worker.ticking import Ticking

_DEADLINE_S = 120.0


class Channel:
    """Counts ticks; `reached` is set when `upto` were sent."""

    def __init__(self, *, num_ranks: int = 2, upto: int = 3, breaks: bool = False) -> None:
        self.num_ranks = num_ranks
        self.num_ticks = 0
        self.upto = upto
        self.breaks = breaks
        self.reached = threading.Event()

    def idle(self) -> None:
        self.num_ticks += 1
        if self.num_ticks >= self.upto:
            self.reached.set()
        if self.breaks:
            raise RuntimeError("a follower is gone")


def started(channel: Channel) -> Ticking:
    ticking = Ticking(channel, every_s=0.001)
    ticking.start()
    return ticking


def test_ticks_are_sent_until_it_is_finished():
    channel = Channel()
    ticking = started(channel)
    assert channel.reached.wait(_DEADLINE_S)
    ticking.finish()
    num_ticks = channel.num_ticks
    assert not threading.Event().wait(0.05)
    assert channel.num_ticks == num_ticks


def test_no_tick_is_sent_while_a_batch_is():
    channel = Channel()
    ticking = started(channel)
    assert channel.reached.wait(_DEADLINE_S)
    with ticking.paused():
        num_ticks = channel.num_ticks
        assert not threading.Event().wait(0.05)
        assert channel.num_ticks == num_ticks
        channel.upto = num_ticks + 3
        channel.reached.clear()
    assert channel.reached.wait(_DEADLINE_S)
    ticking.finish()


def test_a_follower_that_is_gone_is_said_when_rank_0_needs_it():
    channel = Channel(upto=1, breaks=True)
    ticking = started(channel)
    assert channel.reached.wait(_DEADLINE_S)
    with pytest.raises(RuntimeError, match="a follower is gone"):
        ticking.finish()


def test_a_gang_of_one_rank_ticks_for_nobody():
    channel = Channel(num_ranks=1, breaks=True)
    ticking = started(channel)
    ticking.finish()
    assert channel.num_ticks == 0
