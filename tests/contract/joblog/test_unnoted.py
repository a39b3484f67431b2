"""What an intake knows of the futures that were submitted through it, and when it must look."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.support.joblog_bench import MODEL, Bench
from tests.support.polling import until

from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, TenantId, future_id
from gradstream.shared.joblog.port import FutureStatus, FutureView, Receipt
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.joblog.waiters import NoteTail

_DEADLINE_S = 60.0
_LONG_S = 600.0


def tail_of(intake: RedisIntake) -> NoteTail:
    assert intake._tail is not None
    return intake._tail


@pytest.fixture
async def looks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[FutureView | None]:
    """What each look at a future found, of an intake that follows the notes."""
    await until(lambda: tail_of(bench.intake)._is_following)
    look: Callable[[FutureId], Awaitable[FutureView | None]] = bench.intake.future
    found: list[FutureView | None] = []

    async def noted(future: FutureId) -> FutureView | None:
        found.append(await look(future))
        return found[-1]

    monkeypatch.setattr(bench.intake, "future", noted)
    return found


async def poll(bench: Bench, future: FutureId, *, tenant: TenantId = LOCAL_TENANT) -> FutureStatus:
    view = await asyncio.wait_for(bench.intake.wait(future, timeout_s=_LONG_S, tenant=tenant), _DEADLINE_S)
    assert view is not None
    return view.status


async def noted_while_submitting(bench: Bench) -> Receipt:
    """A job that was accepted and done, and whose note has come, while the answer to its submission is still on its way."""
    receipt = await bench.create()
    tail = tail_of(bench.intake)
    tail.submitting(receipt.future_id)
    await asyncio.to_thread(bench.commit, bench.log())
    await until(lambda: receipt.future_id not in tail._unnoted)
    return receipt


async def test_who_submitted_here_is_looked_for_once_when_it_is_done(
    bench: Bench, looks: list[FutureView | None]
) -> None:
    receipt = await bench.create()
    waiter = asyncio.create_task(poll(bench, receipt.future_id))
    await asyncio.sleep(0)
    assert looks == []
    await asyncio.to_thread(bench.commit, bench.log())
    assert await waiter is FutureStatus.DONE
    assert len(looks) == 1
    assert await poll(bench, receipt.future_id) is FutureStatus.DONE
    assert len(looks) == 2


async def test_another_tenant_is_looked_for(bench: Bench, looks: list[FutureView | None]) -> None:
    receipt = await bench.create()
    assert await poll(bench, receipt.future_id, tenant=TenantId("stranger")) is FutureStatus.QUEUED
    assert len(looks) == 1


async def test_a_note_that_comes_before_the_answer_to_the_submission_is_not_waited_for(
    bench: Bench, looks: list[FutureView | None]
) -> None:
    receipt = await noted_while_submitting(bench)
    tail = tail_of(bench.intake)
    tail.accepted(receipt.future_id, LOCAL_TENANT)
    assert await poll(bench, receipt.future_id) is FutureStatus.DONE
    assert len(looks) == 1


async def test_a_submission_that_was_known_already_is_looked_for(bench: Bench, looks: list[FutureView | None]) -> None:
    await bench.create()
    await asyncio.to_thread(bench.commit, bench.log())
    assert (await bench.create()).is_duplicate
    assert await poll(bench, future_id(MODEL, 0)) is FutureStatus.DONE
    assert len(looks) == 1


async def test_a_refused_submission_is_not_remembered(bench: Bench, looks: list[FutureView | None]) -> None:
    with pytest.raises(Exception, match="there is no model"):
        await bench.submit(1)
    assert tail_of(bench.intake)._unnoted == {}
    assert await bench.intake.wait(future_id(MODEL, 1), timeout_s=_LONG_S, tenant=LOCAL_TENANT) is None
    assert looks == [None]


async def test_notes_that_were_missed_leave_nobody_waiting(bench: Bench, looks: list[FutureView | None]) -> None:
    receipt = await bench.create()
    tail = tail_of(bench.intake)
    assert tail.is_unnoted(receipt.future_id, LOCAL_TENANT)
    bench.raw.client_kill_filter(_type="normal", skipme=True)
    await until(lambda: not tail._is_following)
    await asyncio.to_thread(bench.commit, bench.log())
    # The first thing that it does when it is back is to wake those who wait already.
    await until(lambda: tail._is_following)
    assert await poll(bench, receipt.future_id) is FutureStatus.DONE
    assert looks


async def test_a_number_that_is_missing_makes_everybody_look(bench: Bench, looks: list[FutureView | None]) -> None:
    receipt = await bench.create()
    future = bench.keys.future(receipt.future_id)
    # Done, with a note that was trimmed before it was read.
    bench.raw.hset(future, mapping={"status": "done", "outcome": "x"})
    bench.raw.hincrby(bench.keys.stat, "notes", 1)
    other = await bench.submit(1)
    await asyncio.to_thread(bench.raw.xadd, bench.keys.notes, {"futures": other.future_id}, id="2-0")
    await until(lambda: tail_of(bench.intake)._unnoted == {})
    assert await poll(bench, receipt.future_id) is FutureStatus.DONE
    assert len(looks) == 1


async def test_a_retry_that_was_on_its_way_when_the_note_came_leaves_nobody_waiting(
    bench: Bench, looks: list[FutureView | None]
) -> None:
    receipt = await noted_while_submitting(bench)
    tail = tail_of(bench.intake)
    # The retry begins, and only then the first answer comes.
    tail.submitting(receipt.future_id)
    tail.accepted(receipt.future_id, LOCAL_TENANT)
    waiter = asyncio.create_task(poll(bench, receipt.future_id))
    await asyncio.sleep(0)
    assert looks == []
    tail.not_accepted(receipt.future_id)
    assert await waiter is FutureStatus.DONE


async def test_an_emptied_queue_leaves_nobody_waiting(bench: Bench, looks: list[FutureView | None]) -> None:
    for seq in range(3):
        await (bench.submit(seq) if seq else bench.create())
    await asyncio.to_thread(bench.commit, bench.log())
    lost = await bench.submit(3)
    tail = tail_of(bench.intake)
    await until(lambda: future_id(MODEL, 2) not in tail._unnoted)
    bench.raw.flushall()
    waiter = asyncio.create_task(bench.intake.wait(lost.future_id, timeout_s=_LONG_S, tenant=LOCAL_TENANT))
    await asyncio.sleep(0)
    assert looks == []
    assert await asyncio.wait_for(waiter, _DEADLINE_S) is None
    # Nothing is restored, and the notes begin anew.
    bench.epoch, bench.number = await asyncio.to_thread(bench.feed.acquire, owner="the next gang"), 0
    other = ModelId("s2:train:0")
    receipt = await bench.create(other)
    await asyncio.to_thread(bench.commit, bench.log())
    assert await poll(bench, receipt.future_id) is FutureStatus.DONE


async def test_of_very_many_open_futures_the_rest_are_looked_for(
    bench: Bench, looks: list[FutureView | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstream.shared.joblog.waiters._MAX_UNNOTED", 2)
    await bench.create()
    for seq in range(1, 4):
        await bench.submit(seq)
    assert len(tail_of(bench.intake)._unnoted) == 2
    waiter = asyncio.create_task(poll(bench, future_id(MODEL, 3)))
    await until(lambda: len(looks) == 1)
    await asyncio.to_thread(bench.commit, bench.log())
    assert await waiter is FutureStatus.DONE
