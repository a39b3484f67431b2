"""One look tells who leads, how fresh its heartbeat is, what runs, and how much waits."""

import pytest
from tests.support.joblog_bench import Bench

from gradstream.shared.ids import TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus
from gradstream.shared.wire import OptimStepDone

_TTL_S = Limits().lease_ttl_s
_DONE = OptimStepDone(metrics={})


async def look(bench: Bench, tenant: str = "local"):
    return await bench.intake.vitals(TenantId(tenant))


async def test_an_engine_that_nobody_leads_has_no_heartbeat(bench: Bench) -> None:
    bench.feed.release(bench.epoch)
    vitals = await look(bench)
    assert (vitals.epoch, vitals.heartbeat_age_s, vitals.running) == (None, None, None)


async def test_the_heartbeat_of_the_leader_ages_from_its_last_renewal(bench: Bench) -> None:
    bench.feed.renew(bench.epoch)
    fresh = await look(bench)
    assert fresh.epoch == bench.epoch
    assert 0 <= fresh.heartbeat_age_s < 5
    bench.raw.pexpire(bench.keys.lease, 9000)
    assert (await look(bench)).heartbeat_age_s >= _TTL_S - 9


async def test_jobs_are_counted_until_they_have_an_outcome_and_accepted_ones_for_ever(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1)
    assert (await bench.submit(3)).status is FutureStatus.HELD
    before = await look(bench)
    assert (before.num_jobs, before.num_accepted, before.num_bytes > 0) == (3, 2, True)
    bench.commit(bench.log()[:1], _DONE)
    after = await look(bench)
    assert (after.num_jobs, after.num_accepted) == (2, 2)


async def test_only_the_jobs_of_the_tenant_that_asks_are_named_as_its_own(bench: Bench) -> None:
    await bench.create()
    assert (await look(bench, "local")).tenant_jobs + (await look(bench, "stranger")).tenant_jobs == 1
    assert (await look(bench, "stranger")).tenant_jobs == 0


async def test_a_batch_runs_from_its_note_to_its_commit(bench: Bench) -> None:
    await bench.create()
    futures = [entry.job.future_id for entry in bench.log()]
    bench.feed.note_running(1, "create_model", futures, epoch=bench.epoch)
    running = (await look(bench)).running
    assert (running.op, running.num_jobs) == ("create_model", 1)
    assert running.for_s >= 0
    bench.commit(bench.log(), _DONE, number=1)
    assert (await look(bench)).running is None


async def test_a_batch_that_was_noted_is_over_when_later_ones_are(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1)
    first, second = bench.log()
    bench.feed.note_running(1, "create_model", [first.job.future_id], epoch=bench.epoch)
    for number, entry in ((1, first), (2, second)):
        bench.commit([entry], _DONE, number=number)
    assert (await look(bench)).running is None


async def test_what_a_gang_left_running_is_not_said_of_its_successor(bench: Bench) -> None:
    await bench.create()
    bench.feed.note_running(1, "create_model", [entry.job.future_id for entry in bench.log()], epoch=bench.epoch)
    bench.feed.acquire(owner="test-gang")
    assert (await look(bench)).running is None


@pytest.mark.parametrize("field", ["num_jobs", "num_bytes", "num_accepted", "tenant_jobs"])
async def test_an_empty_engine_has_counted_nothing(bench: Bench, field: str) -> None:
    assert getattr(await look(bench), field) == 0
