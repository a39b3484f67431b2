"""The lease is renewed whatever Redis answers, until it is lost."""

import threading

import pytest

from gradstream.shared.joblog.port import Fenced
from gradstream.worker import fence
from gradstream.worker.fence import LeaseKeeper


class OddFeed:
    """Answers the first renewal with an error that nobody foresaw, the second well, and says at the third that the epoch is over."""

    def __init__(self) -> None:
        self.num_renewals = 0

    def renew(self, _epoch: int) -> None:
        self.num_renewals += 1
        if self.num_renewals == 1:
            raise RuntimeError("an odd answer")
        if self.num_renewals == 3:
            raise Fenced("epoch 1 is over")


def test_an_unforeseen_error_does_not_end_the_renewals_and_a_lost_epoch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RENEW_EVERY_S", 0.001)
    feed, lost = OddFeed(), threading.Event()
    keeper = LeaseKeeper(feed, epoch=1, on_fenced=lambda _reason: lost.set())  # type: ignore[arg-type]
    keeper.start()
    assert lost.wait(120)
    keeper.close()
    assert feed.num_renewals == 3
