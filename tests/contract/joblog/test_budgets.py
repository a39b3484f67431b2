"""Back-pressure: what is refused, for how long, and that the missing job always finds room."""

import pytest
from tests.support.joblog_bench import MODEL, Bench
from tests.support.polling import until

from gradstream.shared.errors import QueueFull
from gradstream.shared.ids import FutureId, ModelId, SamplerId, TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import Submission
from gradstream.shared.wire import OptimStepDone

LOCAL = TenantId("local")
SECOND = ModelId("s1:train:1")


async def test_a_model_with_too_many_queued_jobs_is_full_until_one_is_done(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=3)) as bench:
        await bench.ready()
        for seq in (1, 2, 3):
            await bench.submit(seq)
        with pytest.raises(QueueFull, match="3 jobs are queued here, the limit is 3") as caught:
            await bench.submit(4)
        assert 1.0 <= caught.value.retry_after_s <= 30.0
        await bench.create(SECOND)
        bench.commit(bench.log()[1:2])
        await bench.submit(4)


async def test_a_full_queue_still_knows_its_duplicates(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=2)) as bench:
        await bench.create()
        await bench.submit(1)
        assert (await bench.submit(1)).is_duplicate


async def test_held_jobs_leave_room_for_the_one_they_wait_for(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=8)) as bench:
        await bench.ready()
        for seq in range(2, 8):
            await bench.submit(seq)
        with pytest.raises(QueueFull):
            await bench.submit(8)
        await bench.submit(1)
        assert bench.seqs() == list(range(8))


async def test_a_seq_beyond_the_window_is_sent_back(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(hold_window=4)) as bench:
        await bench.create()
        await bench.submit(4)
        for attempt in (bench.submit(5), bench.intake.refuse(model=ModelId("s1:train:0"), seq=5, tenant=LOCAL)):
            with pytest.raises(QueueFull, match="4 ahead of the model's next one, and 4 are held"):
                await attempt


async def test_bytes_are_counted_per_tenant_and_given_back(joblog_url: str, engine_name: str) -> None:
    limits = Limits(max_queued_bytes_per_tenant=1000)
    async with Bench.running(joblog_url, engine_name, limits) as bench:
        await bench.ready()
        await bench.create(SECOND, tenant=TenantId("other"))
        await bench.submit(1, b"x" * 700)
        with pytest.raises(QueueFull, match="700 bytes of this tenant are queued, the limit is 1000"):
            await bench.submit(2, b"y" * 700)
        await bench.submit(1, b"z" * 700, model=SECOND, tenant=TenantId("other"))
        bench.commit(bench.log()[2:3])
        await bench.submit(2, b"y" * 700)


async def test_bytes_are_counted_for_the_whole_queue(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_bytes=1000)) as bench:
        await bench.ready()
        await bench.submit(1, b"x" * 700)
        with pytest.raises(QueueFull, match="700 bytes are queued, the limit is 1000"):
            await bench.submit(2, b"y" * 700)


async def test_jobs_are_counted_per_tenant_whatever_they_belong_to(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_tenant=3)) as bench:
        await bench.ready()
        await bench.create(SECOND)
        await bench.submit(1)
        sample = Submission(
            owner=SamplerId("s:sample:0"), seq=0, op="sample", tenant=LOCAL, payload=b"p", ordered=False
        )
        await bench.intake.submit(sample)
        with pytest.raises(QueueFull, match="3 jobs of this tenant are queued, the limit is 3"):
            await bench.submit(2)
        await bench.create(ModelId("s2:train:0"), tenant=TenantId("other"))
        bench.commit(bench.log()[2:3])
        await bench.submit(2)


async def test_however_much_others_queue_there_is_room_for_one_more_tenant(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_bytes=40_000)) as bench:
        queued = {}
        for number in range(4):
            tenant, model = TenantId(f"t{number}"), ModelId(f"s{number}:train:0")
            await bench.create(model, tenant=tenant)
            queued[tenant] = 0
            for seq in range(1, 100):
                try:
                    await bench.submit(seq, bytes(1000), model=model, tenant=tenant)
                except QueueFull:
                    break
                queued[tenant] += 1000
            with pytest.raises(QueueFull, match="it may hold as many as are free"):
                await bench.submit(queued[tenant] // 1000 + 1, bytes(1000), model=model, tenant=tenant)
        assert sum(queued.values()) < 40_000
        assert min(queued.values()) > 0
        assert list(queued.values()) == sorted(queued.values(), reverse=True)


async def test_a_samplers_jobs_have_a_budget_of_their_own(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_sampler=2)) as bench:
        samples = [
            Submission(owner=SamplerId("s:sample:0"), seq=n, op="sample", tenant=LOCAL, payload=b"p", ordered=False)
            for n in range(3)
        ]
        await bench.intake.submit(samples[0])
        await bench.intake.submit(samples[1])
        with pytest.raises(QueueFull):
            await bench.intake.submit(samples[2])


async def test_all_counters_return_to_zero_when_everything_is_done(bench: Bench) -> None:
    await bench.ready()
    for seq in (3, 1, 2, 5):
        await bench.submit(seq, b"x" * (seq * 1000))
    await bench.intake.refuse(model=ModelId("s1:train:0"), seq=4, tenant=LOCAL)
    bench.commit([entry for entry in bench.log() if entry.is_open], OptimStepDone(metrics={}))
    stat = bench.raw.hgetall(bench.keys.stat)
    assert (stat["queued_jobs"], stat["queued_bytes"]) == ("0", "0")
    assert bench.raw.hgetall(f"{bench.keys.prefix}tenants") == {}
    assert bench.raw.hgetall(f"{bench.keys.prefix}tenant_jobs") == {}
    record = await bench.record()
    assert (record["queued"], record["held"], record["applied"], record["next_seq"]) == ("0", "0", "5", "6")


async def test_the_advised_delay_grows_with_the_work_that_is_queued(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=4)) as bench:
        await bench.ready()
        bench.raw.hset(bench.keys.stat, "ewma_ms", "2500")
        for seq in (1, 2, 3, 4):
            await bench.submit(seq)
        with pytest.raises(QueueFull) as caught:
            await bench.submit(5)
        assert caught.value.retry_after_s == pytest.approx(10.0)
        bench.raw.hset(bench.keys.stat, "ewma_ms", "1000000")
        with pytest.raises(QueueFull) as caught:
            await bench.submit(5)
        assert caught.value.retry_after_s == 30.0


async def test_results_that_nobody_fetches_stop_their_tenant_and_no_other(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_unread_bytes_per_tenant=1000)) as bench:
        await bench.ready()
        await bench.create(SECOND, tenant=TenantId("other"))
        for seq in (1, 2):
            await bench.submit(seq)
        bench.commit(bench.log()[2:4])
        with pytest.raises(QueueFull, match=r"has not fetched take \d+ bytes, the limit is 1000; fetch some"):
            await bench.submit(3)
        assert (await bench.submit(2)).is_duplicate
        await bench.submit(1, model=SECOND, tenant=TenantId("other"))
        for seq in (0, 1, 1):
            bench.intake.mark_delivered(FutureId(f"{MODEL}:{seq}"))
        await until(lambda: 0 < bench.raw.ttl(bench.keys.future(f"{MODEL}:1")) <= Limits().delivered_ttl_s)
        await bench.submit(3)


async def test_results_that_expired_unread_are_counted_no_more(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_unread_bytes_per_tenant=1000)) as bench:
        await bench.ready()
        for seq in (1, 2):
            await bench.submit(seq)
        bench.commit(bench.log()[1:3])
        with pytest.raises(QueueFull):
            await bench.submit(3)
        # The clock of the server cannot be turned; the end of their time is moved into the past instead.
        ends = f"{bench.keys.prefix}unread_until:{LOCAL}"
        assert bench.raw.zadd(ends, dict.fromkeys(bench.raw.zrange(ends, 0, -1), 1), ch=True) >= 2
        await bench.submit(3)


async def test_what_gives_something_back_is_accepted_however_much_is_unread(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_unread_bytes_per_tenant=1)) as bench:
        await bench.ready()
        with pytest.raises(QueueFull):
            await bench.submit(1)
        for number, op in enumerate(("unload_model", "delete_checkpoint")):
            give_back = Submission(owner=MODEL, seq=2**31 + number, op=op, tenant=LOCAL, payload=b"", ordered=False)
            assert not (await bench.intake.submit(give_back)).is_duplicate
