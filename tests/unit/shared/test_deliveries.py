"""Acknowledgements go out some at a time, and nothing that the queue answers ends them."""

from collections.abc import Sequence

import pytest

from gradstream.shared.errors import QueueFull, Unavailable
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog import deliveries
from gradstream.shared.joblog.deliveries import Deliveries


class Queue:
    """Notes what it is told; raises the failures first, one a call."""

    def __init__(self, *failures: Exception) -> None:
        self.calls: list[list[str]] = []
        self._failures = list(failures)

    async def send(self, futures: Sequence[FutureId]) -> None:
        if self._failures:
            raise self._failures.pop(0)
        self.calls.append(list(futures))


async def noted(sender: Deliveries, *names: str) -> None:
    for name in names:
        sender.note(FutureId(name))
    await sender.close()


async def test_what_comes_together_goes_in_order_and_in_calls_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_TOGETHER", 3)
    queue = Queue()
    await noted(Deliveries(queue.send), *"abcdefgh")
    assert queue.calls == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]


async def test_nothing_is_sent_where_nothing_was_noted() -> None:
    queue = Queue()
    await Deliveries(queue.send).close()
    assert queue.calls == []


@pytest.mark.parametrize("failure", [Unavailable("away"), QueueFull("full", retry_after_s=1.0)], ids=["away", "full"])
async def test_with_the_queue_away_the_rest_is_dropped_and_later_ones_are_sent(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    monkeypatch.setattr(deliveries, "_TOGETHER", 2)
    queue = Queue(failure)
    sender = Deliveries(queue.send)
    await noted(sender, *"abcde")
    assert queue.calls == []
    await noted(sender, "f")
    assert queue.calls == [["f"]]


async def test_an_answer_that_nobody_foresaw_ends_only_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_TOGETHER", 2)
    queue = Queue(ValueError("odd"))
    await noted(Deliveries(queue.send), *"abcd")
    assert queue.calls == [["c", "d"]]


async def test_no_more_are_kept_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "_MAX_PENDING", 3)
    queue = Queue()
    await noted(Deliveries(queue.send), *"abcde")
    assert queue.calls == [["a", "b", "c"]]
