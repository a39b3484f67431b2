"""Jobs held for a seq that never comes."""

import asyncio

import pytest
from tests.support.joblog_bench import MODEL, Bench

from gradstream.shared.errors import SequenceConflict, SequenceGap
from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus

IMPATIENT = Limits(hold_timeout_s=0.0)


async def test_a_gap_that_never_closes_fails_the_held_jobs_naming_the_missing_seqs(
    joblog_url: str, engine_name: str
) -> None:
    async with Bench.running(joblog_url, engine_name, IMPATIENT) as bench:
        await bench.create()
        await bench.submit(3)
        await bench.submit(5)
        assert await bench.intake.fail_gaps() == 2
        first, second = await bench.failure(3), await bench.failure(5)
        assert (first.code, first.category) == (SequenceGap.code, "server")
        assert "because seq 1, 2 never came" in first.message
        assert "because seq 1, 2, 4 never came" in second.message
        assert await bench.intake.fail_gaps() == 0


async def test_the_model_goes_on_after_a_failed_gap(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, IMPATIENT) as bench:
        await bench.create()
        await bench.submit(3)
        await bench.intake.fail_gaps()
        assert (await bench.submit(4)).status is FutureStatus.QUEUED
        assert bench.seqs() == [0, 4]
        with pytest.raises(SequenceConflict, match="came too late"):
            await bench.submit(1)
        again = await bench.submit(3)
        assert (again.status, again.is_duplicate) == (FutureStatus.FAILED, True)
        record = await bench.record()
        assert (record["queued"], record["held"], record["next_seq"]) == ("2", "0", "5")


async def test_a_gap_within_its_time_is_left_alone(bench: Bench) -> None:
    await bench.create()
    await bench.submit(3)
    assert await bench.intake.fail_gaps() == 0
    assert (await bench.view(3)).status is FutureStatus.HELD


async def test_younger_jobs_behind_an_expired_one_are_released(bench: Bench) -> None:
    await bench.create()
    await bench.submit(2)
    await bench.submit(3)
    await bench.submit(6)
    # The clock of the server cannot be turned; the arrival of seq 2 is moved into the past instead.
    bench.raw.zadd(f"{bench.keys.prefix}held:{MODEL}", {"2": 1})
    bench.raw.zadd(f"{bench.keys.prefix}gaps", {MODEL: 1})
    assert await bench.intake.fail_gaps() == 1
    assert bench.seqs() == [0, 3]
    assert (await bench.view(6)).waiting_for_seq == 4
    assert bench.raw.zrange(f"{bench.keys.prefix}gaps", 0, -1) == [MODEL]


async def test_a_refused_seq_is_not_named_as_missing(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, IMPATIENT) as bench:
        await bench.create()
        await bench.submit(4)
        await bench.intake.refuse(model=MODEL, seq=2, tenant=TenantId("local"))
        await bench.intake.fail_gaps()
        assert "because seq 1, 3 never came" in (await bench.failure(4)).message


async def test_a_closed_gap_leaves_nothing_to_fail(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, IMPATIENT) as bench:
        await bench.create()
        await bench.submit(2)
        await bench.submit(1)
        assert await bench.intake.fail_gaps() == 0
        assert bench.raw.exists(f"{bench.keys.prefix}gaps") == 0


async def test_a_waiter_wakes_when_its_gap_fails(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, IMPATIENT) as bench:
        await bench.create()
        receipt = await bench.submit(2)
        loop = asyncio.get_running_loop()
        waiter = loop.create_task(bench.intake.wait(receipt.future_id, timeout_s=600))
        await asyncio.sleep(0)
        await bench.intake.fail_gaps()
        view = await asyncio.wait_for(waiter, 60)
        assert view is not None
        assert view.status is FutureStatus.FAILED
