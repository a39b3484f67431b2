"""A sample can be given up by its own tenant until it has started, and then it is neither run nor overwritten."""

from tests.support.joblog_bench import Bench

from gradstream.shared import ids
from gradstream.shared.ids import LOCAL_TENANT, FutureId, SamplerId, SessionId, TenantId
from gradstream.shared.joblog.port import FutureStatus, Submission
from gradstream.shared.wire import OptimStepDone

SAMPLER = ids.sampler_id(SessionId("s1"), 0)


async def submit(bench: Bench, seq: int = 0, *, op: str = "sample") -> FutureId:
    submission = Submission(owner=SAMPLER, seq=seq, op=op, tenant=LOCAL_TENANT, payload=b"p", ordered=False)
    return (await bench.intake.submit(submission)).future_id


async def test_a_waiting_sample_is_cancelled_once(bench: Bench) -> None:
    future = await submit(bench)
    assert await bench.intake.cancel(future, tenant=LOCAL_TENANT)
    assert not await bench.intake.cancel(future, tenant=LOCAL_TENANT)
    view = await bench.intake.future(future)
    assert view is not None
    assert view.status is FutureStatus.FAILED


async def test_another_tenant_cancels_nothing(bench: Bench) -> None:
    future = await submit(bench)
    assert not await bench.intake.cancel(future, tenant=TenantId("other"))
    view = await bench.intake.future(future)
    assert view is not None
    assert view.status is FutureStatus.QUEUED


async def test_a_started_sample_goes_on(bench: Bench) -> None:
    future = await submit(bench)
    assert bench.feed.mark_started([future], epoch=bench.epoch) == []
    assert not await bench.intake.cancel(future, tenant=LOCAL_TENANT)


async def test_a_sample_that_a_gang_left_undone_on_a_clean_stop_counts_no_start_and_can_be_cancelled(
    bench: Bench,
) -> None:
    future = await submit(bench)
    bench.feed.mark_started([future], epoch=bench.epoch)
    for _ in range(2):
        bench.feed.mark_stopped([future], epoch=bench.epoch)
    assert [entry.starts for entry in bench.log()] == [0]
    assert await bench.intake.cancel(future, tenant=LOCAL_TENANT)


async def test_a_clean_stop_takes_back_no_start_of_an_earlier_gang(bench: Bench) -> None:
    future = await submit(bench)
    bench.feed.mark_started([future], epoch=bench.epoch)
    bench.epoch = bench.feed.acquire(owner="test-gang")
    bench.feed.mark_stopped([future], epoch=bench.epoch)
    assert [entry.starts for entry in bench.log()] == [1]
    bench.feed.mark_started([future], epoch=bench.epoch)
    bench.feed.mark_stopped([future], epoch=bench.epoch)
    assert [entry.starts for entry in bench.log()] == [1]


async def test_the_worker_learns_of_a_cancelled_sample_that_it_had_read(bench: Bench) -> None:
    kept, gone = await submit(bench, 0), await submit(bench, 1)
    await bench.intake.cancel(gone, tenant=LOCAL_TENANT)
    assert bench.feed.mark_started([kept, gone], epoch=bench.epoch) == [gone]
    assert [entry.is_open for entry in bench.log()] == [True, False]


async def test_an_outcome_that_comes_all_the_same_does_not_replace_the_cancellation(bench: Bench) -> None:
    future = await submit(bench)
    entries = bench.log()
    await bench.intake.cancel(future, tenant=LOCAL_TENANT)
    bench.commit(entries, OptimStepDone(metrics={}))
    view = await bench.intake.future(future)
    assert view is not None
    assert view.status is FutureStatus.FAILED


async def test_only_samples_are_cancelled(bench: Bench) -> None:
    future = await submit(bench, op="unload_model")
    assert not await bench.intake.cancel(future, tenant=LOCAL_TENANT)


async def test_completions_come_once_each_in_order_across_cursors(bench: Bench) -> None:
    futures = [await submit(bench, seq) for seq in range(3)]
    bench.commit(bench.log(), OptimStepDone(metrics={}))
    found = await bench.intake.completions(SAMPLER, 0, after=0, timeout_s=5)
    assert [item.future_id for item in found.items] == futures
    again = await bench.intake.completions(SAMPLER, 0, after=found.cursor, timeout_s=0)
    assert (list(again.items), again.cursor) == ([], found.cursor)
    assert (await bench.intake.completions(SamplerId("s1:sample:9"), 0, after=0, timeout_s=0)).items == ()
