"""Long polls: woken by the note stream, and by nothing else needed."""

import asyncio
import os
import signal
import time

import pytest
from tests.support.joblog_bench import MODEL, Bench
from tests.support.redis_server import running_server

from gradstream.shared.embedded.server import EmbeddedServer
from gradstream.shared.errors import QueueFull, Unavailable
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus
from gradstream.shared.joblog.redis_intake import RedisIntake


async def test_a_waiter_wakes_when_its_job_is_committed(bench: Bench) -> None:
    receipt = await bench.create()
    waiters = [asyncio.create_task(bench.intake.wait(receipt.future_id, timeout_s=600)) for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.to_thread(bench.commit, bench.log())
    views = await asyncio.wait_for(asyncio.gather(*waiters), 60)
    assert [view.status for view in views if view] == [FutureStatus.DONE] * 3


async def test_every_replica_wakes_its_own_waiters(bench: Bench) -> None:
    receipt = await bench.create()
    async with RedisIntake(bench.url, engine=bench.keys.engine) as replica:
        waiter = asyncio.create_task(replica.wait(receipt.future_id, timeout_s=600))
        await asyncio.sleep(0)
        await asyncio.to_thread(bench.commit, bench.log())
        view = await asyncio.wait_for(waiter, 60)
    assert view is not None
    assert view.status is FutureStatus.DONE


async def test_a_wait_ends_at_its_timeout_with_the_future_as_it_is(bench: Bench) -> None:
    receipt = await bench.create()
    view = await bench.intake.wait(receipt.future_id, timeout_s=0.01)
    assert view is not None
    assert view.status is FutureStatus.QUEUED


async def test_waiting_for_an_unknown_future_ends_at_once(bench: Bench) -> None:
    assert await asyncio.wait_for(bench.intake.wait("nothing:1", timeout_s=600), 60) is None


async def test_a_wait_for_another_tenants_future_ends_at_once(bench: Bench) -> None:
    receipt = await bench.create()
    waiting = bench.intake.wait(receipt.future_id, timeout_s=600, tenant=TenantId("stranger"))
    view = await asyncio.wait_for(waiting, 60)
    assert view is not None
    assert view.status is FutureStatus.QUEUED


async def test_a_cancelled_wait_leaves_the_intake_usable(bench: Bench) -> None:
    receipt = await bench.create()
    for _ in range(20):
        waiter = asyncio.create_task(bench.intake.wait(receipt.future_id, timeout_s=600))
        await asyncio.sleep(0)
        waiter.cancel()
    submits = [asyncio.create_task(bench.submit(seq, b"%d" % seq)) for seq in range(1, 21)]
    await asyncio.sleep(0)
    submits[3].cancel()
    await asyncio.gather(*submits, return_exceptions=True)
    await bench.submit(4, b"4")
    assert [entry.job.payload for entry in bench.log()[1:]] == [b"%d" % seq for seq in range(1, 21)]


async def test_a_waiter_survives_a_restart_of_the_server(engine_name: str) -> None:
    with running_server(durability="always") as server:
        async with Bench.running(server.url, engine_name, Limits()) as bench:
            receipt = await bench.create()
            waiter = asyncio.create_task(bench.intake.wait(receipt.future_id, timeout_s=600))
            await asyncio.sleep(0.05)
            assert server.pid is not None
            _kill(server.pid)
            await asyncio.to_thread(_until_restarted, server)
            assert bench.seqs() == [0]
            await asyncio.to_thread(bench.commit, bench.log())
            view = await asyncio.wait_for(waiter, 60)
            assert view is not None
            assert view.status is FutureStatus.DONE


async def test_an_absent_server_is_unavailable_soon(engine_name: str) -> None:
    with running_server() as server:
        url = server.url
    async with RedisIntake(url, engine=engine_name) as intake:
        with pytest.raises(Unavailable, match="cannot be reached"):
            await asyncio.wait_for(intake.future(f"{MODEL}:0"), 60)


async def test_scripts_are_loaded_again_after_the_server_forgot_them(bench: Bench) -> None:
    await bench.create()
    bench.raw.script_flush()
    await bench.submit(1)
    bench.raw.script_flush()
    bench.commit(bench.log())
    assert (await bench.view(1)).status is FutureStatus.DONE


async def test_a_full_server_refuses_jobs_and_still_takes_results(engine_name: str) -> None:
    with running_server(durability="none") as server:
        async with Bench.running(server.url, engine_name, Limits()) as bench:
            await bench.create()
            bench.raw.config_set("maxmemory", 1)
            with pytest.raises(QueueFull, match="memory limit"):
                await bench.submit(1)
            bench.commit(bench.log())
            assert (await bench.view(0)).status is FutureStatus.DONE
            bench.raw.config_set("maxmemory", 0)
            await bench.submit(1)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _until_restarted(server: EmbeddedServer) -> None:
    deadline = time.monotonic() + 60
    while not server.ensure_running():
        assert time.monotonic() < deadline
        time.sleep(0.02)
