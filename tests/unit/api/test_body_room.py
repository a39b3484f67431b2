"""Room for request bodies: who waits for it, who is refused, and that nothing is left behind."""

import asyncio
import os
import sys
import threading
from types import SimpleNamespace

import pytest
from starlette.requests import Request

from gradstream.api.arrival import note_arrival
from gradstream.api.auth import SCOPE_TENANT
from gradstream.api.body import offloaded, raw_body
from gradstream.api.limits import ByteBudget
from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import QueueFull
from gradstream.shared.ids import LOCAL_TENANT, TenantId


async def test_a_body_that_does_not_fit_yet_waits_for_room_in_the_order_of_arrival() -> None:
    budget, order = ByteBudget(100), []

    async def request(name: str, count: int) -> None:
        with budget.lease(LOCAL_TENANT) as lease:
            await lease.wait(count, timeout_s=30.0)
            order.append(name)

    with budget.lease(LOCAL_TENANT) as first:
        first.take(45)
        waiting = [asyncio.create_task(request(name, count)) for name, count in (("large", 40), ("small", 1))]
        await asyncio.sleep(0)
        with budget.lease(TenantId("other")) as other:
            await other.wait(10, timeout_s=0.0)
        assert order == []
    await asyncio.gather(*waiting)
    assert (order, budget.held_bytes) == (["large", "small"], 0)


async def test_a_body_for_which_no_room_comes_is_refused_and_holds_nothing() -> None:
    budget = ByteBudget(100)
    with budget.lease(LOCAL_TENANT) as first:
        first.take(45)
        with budget.lease(LOCAL_TENANT) as second, pytest.raises(QueueFull, match="no room for 40 bytes"):
            await second.wait(40, timeout_s=0.01)
        assert budget.held_bytes == 45
    assert budget.held_bytes == 0


async def test_a_client_that_goes_away_while_its_body_waits_leaves_nothing_behind() -> None:
    budget = ByteBudget(100)

    async def request() -> None:
        with budget.lease(LOCAL_TENANT) as lease:
            await lease.wait(40, timeout_s=30.0)

    with budget.lease(LOCAL_TENANT) as first:
        first.take(45)
        gone, let_in = asyncio.create_task(request()), asyncio.create_task(request())
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
    # Room was found for this one, and it is cancelled before it hears of it.
    let_in.cancel()
    await asyncio.gather(let_in, return_exceptions=True)
    assert budget.held_bytes == 0


async def test_a_request_that_has_waited_elsewhere_for_as_long_as_it_may_waits_no_more_for_room_for_its_body() -> None:
    clock, budget = ManualClock(), ByteBudget(1 << 20)
    parts = SimpleNamespace(clock=clock, bodies=budget, config=SimpleNamespace(admit_hold_s=30.0))
    scope = {"type": "http", "headers": [(b"content-length", b"500000")], SCOPE_TENANT: LOCAL_TENANT}

    async def request() -> None:
        async with raw_body(Request(scope), parts, max_bytes=1 << 20):  # type: ignore[arg-type]
            raise AssertionError("there is no room")

    note_arrival(clock)
    clock.advance(31.0)
    with budget.lease(LOCAL_TENANT) as first:
        first.take(400_000)
        with pytest.raises(QueueFull, match="no room for 500000 bytes"):
            await asyncio.wait_for(request(), timeout=120.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives each thread a niceness of its own")
@pytest.mark.parametrize("size_bytes", [1 << 20, 1 << 25])
async def test_work_on_large_bodies_leaves_the_cores_to_the_event_loop(size_bytes: int) -> None:
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert await offloaded(niceness, size_bytes=size_bytes) == min(own + 4, 19)
    assert niceness() == own
