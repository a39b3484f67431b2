"""Results become visible in one step, once, and only by the holder of the epoch."""

import asyncio
from typing import cast

import pytest
import redis
from tests.support.joblog_bench import MODEL, Bench, ready
from tests.support.polling import until

from gradstream.shared import codec
from gradstream.shared.catalog import EngineCard
from gradstream.shared.errors import Unavailable
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import BatchId, Commit, Covered, Ended, Fenced, FutureStatus, RecordKind, RecordWrite
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.wire import Failed, OptimStepDone


async def test_a_commit_shows_outcome_record_position_and_journal_together(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1)
    done = OptimStepDone(metrics={"grad_norm": 1.5})
    bench.commit(bench.log(), done, records=[ready()])
    view = await bench.view(1)
    assert view.status is FutureStatus.DONE
    assert view.outcome is not None
    assert codec.decode_outcome(view.outcome) == done
    record = await bench.record()
    assert (record["state"], record["epoch"], record["applied"]) == ("ready", str(bench.epoch), "1")
    ((entry_id, entry),) = bench.raw.xrange(bench.keys.journal)
    assert entry_id == f"{bench.epoch}-1"
    assert entry["futures"] == f"{MODEL}:0 {MODEL}:1"
    assert (entry["ops"], entry["statuses"]) == ("optim_step optim_step", "done done")
    assert entry["digests"].split(" ") == [codec.digest(codec.encode(done))] * 2
    assert entry["plan"] == "plan"
    assert bench.feed.cursor() == "2-0"


async def test_a_failed_outcome_makes_a_failed_future(bench: Bench) -> None:
    await bench.create()
    failed = Failed(code="invalid_request", category="user", message="no")
    bench.commit(bench.log(), failed)
    assert (await bench.view(0)).status is FutureStatus.FAILED
    assert await bench.failure(0) == failed


async def test_the_same_commit_again_changes_nothing(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    commit = bench.commit(bench.log()[1:])
    before = (await bench.record(), bench.raw.hgetall(bench.keys.stat), bench.raw.xlen(bench.keys.journal))
    bench.feed.commit(commit)
    assert (await bench.record(), bench.raw.hgetall(bench.keys.stat), bench.raw.xlen(bench.keys.journal)) == before


async def test_the_first_outcome_of_a_job_stays(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    entries = bench.log()[1:]
    bench.commit(entries, OptimStepDone(metrics={"n": 1.0}))
    bench.commit(entries, OptimStepDone(metrics={"n": 2.0}))
    outcome = (await bench.view(1)).outcome
    assert outcome is not None
    assert codec.decode_outcome(outcome) == OptimStepDone(metrics={"n": 1.0})
    assert (await bench.record())["queued"] == "0"
    assert bench.raw.hget(bench.keys.stat, "other_outcomes") == "1"


async def test_a_batch_number_that_goes_back_is_a_callers_mistake(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    with pytest.raises(ValueError, match="does not come after batch"):
        bench.commit(bench.log()[1:], number=1)
    assert (await bench.view(1)).status is FutureStatus.QUEUED


async def test_an_older_epoch_changes_nothing(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    old, bench.epoch = bench.epoch, bench.feed.acquire(owner="test-gang")
    card = _card()
    before = (await bench.record(), bench.raw.hgetall(bench.keys.stat), bench.num_keys())
    for attempt in (
        lambda: bench.commit(bench.log()[1:], epoch=old, records=[ready()]),
        lambda: bench.feed.publish_card(card, epoch=old),
        lambda: bench.feed.adopt([], lost={}, epoch=old),
        lambda: bench.feed.name_snapshot({"cut": "1-1"}, epoch=old),
        lambda: bench.feed.mark_started([], epoch=old),
        lambda: bench.feed.mark_stopped([], epoch=old),
        lambda: bench.feed.renew(old),
        lambda: bench.feed.release(old),
    ):
        with pytest.raises(Fenced, match=f"epoch {old} is over: epoch {bench.epoch} has begun"):
            attempt()
    assert (await bench.record(), bench.raw.hgetall(bench.keys.stat), bench.num_keys()) == before


async def test_another_owner_must_wait_for_the_lease(bench: Bench) -> None:
    with RedisFeed(bench.url, engine=bench.keys.engine) as other:
        with pytest.raises(Unavailable, match=r"another worker, 'test-gang'.* ends in \d+\.\d s"):
            other.acquire(owner="second")
        assert await bench.intake.is_worker_alive()
        bench.feed.release(bench.epoch)
        assert not await bench.intake.is_worker_alive()
        assert other.acquire(owner="second") == bench.epoch + 1
    with pytest.raises(Fenced):
        bench.feed.renew(bench.epoch)


async def test_an_expired_lease_lets_another_owner_in_and_renewing_keeps_it(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(lease_ttl_s=60.0)) as bench:
        assert 50_000 < bench.raw.pttl(bench.keys.lease) <= 60_000
        with RedisFeed(bench.url, engine=engine_name) as other:
            # The clock of the server cannot be turned; the lease's end is moved instead.
            bench.raw.pexpire(bench.keys.lease, 1)
            async with asyncio.timeout(60):
                while await bench.intake.is_worker_alive():  # noqa: ASYNC110  an expiry in Redis gives no event
                    await asyncio.sleep(0.01)
            bench.feed.renew(bench.epoch)
            assert await bench.intake.is_worker_alive()
            assert 50_000 < bench.raw.pttl(bench.keys.lease) <= 60_000
            bench.raw.delete(bench.keys.lease)
            assert other.acquire(owner="second") == bench.epoch + 1


async def test_models_that_a_gang_does_not_adopt_are_lost_and_those_being_made_are_not(bench: Bench) -> None:
    await bench.ready()
    await bench.create("s1:train:1")
    bench.epoch = bench.feed.acquire(owner="test-gang")
    for _ in range(2):
        assert bench.feed.adopt([], lost={MODEL: "it diverged"}, epoch=bench.epoch).lost == [MODEL]
    record = await bench.record()
    assert (record["state"], record["error"]) == ("lost", "it diverged")
    assert (await bench.record("s1:train:1"))["state"] == "creating"


async def test_an_adopted_model_is_the_new_epochs_and_one_that_is_gone_is_named(bench: Bench) -> None:
    await bench.ready()
    bench.epoch = bench.feed.acquire(owner="test-gang")
    gone = ModelId("s1:train:7")
    adoption = bench.feed.adopt([MODEL, gone], lost={}, epoch=bench.epoch)
    assert (adoption.needless, adoption.lost) == ([gone], [])
    record = await bench.record()
    assert (record["state"], record["epoch"]) == ("ready", str(bench.epoch))


async def test_an_epoch_is_above_what_the_disk_knows(bench: Bench) -> None:
    assert bench.feed.acquire(owner="test-gang", above=40) == 41
    assert bench.feed.acquire(owner="test-gang", above=7) == 42


async def test_a_batch_that_a_dead_gang_logged_is_committed_by_its_successor(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    (entry,) = bench.log()[1:]
    old, bench.epoch = bench.epoch, bench.feed.acquire(owner="test-gang")
    commit = Commit(
        epoch=bench.epoch,
        number=0,
        batch=BatchId(old, 2),
        outcomes=[Ended.of(entry.job, OptimStepDone(metrics={}))],
        plan=b"plan",
        cursor=entry.entry_id,
    )
    for _ in range(2):
        bench.feed.commit(commit)
    assert (await bench.view(1)).status is FutureStatus.DONE
    assert bench.feed.last_batch() == BatchId(old, 2)
    assert bench.raw.xlen(bench.keys.journal) == 2


async def test_nothing_is_trimmed_that_no_snapshot_covers(joblog_url: str, engine_name: str) -> None:
    limits = Limits(keep_log_entries=0, keep_journal_entries=0)
    async with Bench.running(joblog_url, engine_name, limits) as bench:
        await bench.ready()
        for seq in range(1, 600):
            await bench.submit(seq)
            (entry,) = (one for one in bench.log() if one.is_open)
            bench.feed.commit(
                Commit(
                    epoch=bench.epoch,
                    number=seq + 1,
                    outcomes=[Ended.of(entry.job, OptimStepDone(metrics={}))],
                    plan=b"plan",
                    cursor=entry.entry_id,
                    covered=Covered(batch=BatchId(bench.epoch, 300), entry_id="300-0"),
                )
            )
        for key in (bench.keys.journal, bench.keys.log):
            ((first, _),) = bench.raw.xrange(key, count=1)
            assert 1 < int(first.split("-")[1 if key == bench.keys.journal else 0]) <= 300, key


async def test_a_start_is_counted_once_per_epoch_and_not_after_the_outcome(bench: Bench) -> None:
    await bench.create()
    future_ids = [entry.job.future_id for entry in bench.log()]
    bench.feed.mark_started(future_ids, epoch=bench.epoch)
    bench.feed.mark_started(future_ids, epoch=bench.epoch)
    assert [entry.starts for entry in bench.log()] == [1]
    bench.epoch = bench.feed.acquire(owner="test-gang")
    bench.feed.mark_started(future_ids, epoch=bench.epoch)
    assert [entry.starts for entry in bench.log()] == [2]


async def test_reading_from_the_cursor_shows_every_open_job(bench: Bench) -> None:
    await bench.ready()
    for seq in (1, 2, 3):
        await bench.submit(seq)
    entries = bench.log()
    bench.commit(entries[3:4], cursor=entries[0].entry_id)
    seen = bench.feed.read(bench.feed.cursor(), count=10, block_ms=0)
    assert [(entry.job.seq, entry.is_open) for entry in seen] == [(1, True), (2, True), (3, False)]


async def test_the_log_is_trimmed_behind_the_cursor_only(joblog_url: str, engine_name: str) -> None:
    limits = Limits(keep_log_entries=0, max_queued_jobs_per_model=2000)
    async with Bench.running(joblog_url, engine_name, limits) as bench:
        await bench.ready()
        for start in range(1, 1001, 100):
            await asyncio.gather(*(bench.submit(seq) for seq in range(start, start + 100)))
        entries = bench.log()
        bench.commit(entries[1:601])
        open_entries = bench.feed.read(bench.feed.cursor(), count=2000, block_ms=0)
        assert [entry.job.seq for entry in open_entries] == list(range(601, 1001))
        assert bench.raw.xlen(bench.keys.log) < 600


async def test_the_cursor_never_goes_back(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    entries = bench.log()
    bench.commit(entries[1:])
    bench.commit(entries[:1])
    assert bench.feed.cursor() == "2-0"


async def test_the_projection_group_shows_the_lag(bench: Bench) -> None:
    await bench.ready()
    for seq in (1, 2, 3):
        await bench.submit(seq)
    (group,) = bench.raw.xinfo_groups(bench.keys.log)
    assert (group["name"], group["last-delivered-id"], group["lag"]) == ("worker", "1-0", 3)


async def test_records_of_other_kinds_are_written_and_removed_with_a_commit(bench: Bench) -> None:
    made = RecordWrite(kind=RecordKind.CHECKPOINT, record_id="c", fields={"path": "tinker://x"})
    bench.commit([], records=[made])
    assert await bench.intake.record(RecordKind.CHECKPOINT, "c") == {"path": "tinker://x"}
    bench.commit([], records=[RecordWrite(kind=RecordKind.CHECKPOINT, record_id="c", fields=None)])
    assert await bench.intake.record(RecordKind.CHECKPOINT, "c") is None


async def test_the_card_comes_back_as_published(bench: Bench) -> None:
    assert await bench.intake.card() is None
    bench.feed.publish_card(_card(), epoch=bench.epoch)
    assert await bench.intake.card() == _card()


async def test_a_card_that_somebody_deleted_is_back_with_the_next_renewal(bench: Bench) -> None:
    bench.feed.renew(bench.epoch)
    assert await bench.intake.card() is None
    bench.feed.publish_card(_card(), epoch=bench.epoch)
    bench.raw.delete(bench.keys.card)
    bench.feed.renew(bench.epoch)
    assert await bench.intake.card() == _card()


async def test_a_delivered_result_lives_shorter_and_an_open_future_for_ever(bench: Bench) -> None:
    await bench.create()
    key, witness = bench.keys.future(f"{MODEL}:0"), bench.keys.future(f"{MODEL}:1")
    await bench.submit(1)
    bench.commit(bench.log()[1:])
    bench.intake.mark_delivered(FutureId(f"{MODEL}:0"))
    bench.intake.mark_delivered(FutureId(f"{MODEL}:1"))
    await until(lambda: 0 < bench.raw.ttl(witness) <= Limits().delivered_ttl_s)
    assert bench.raw.ttl(key) == -1
    bench.commit(bench.log()[:1])
    assert bench.raw.ttl(key) > Limits().delivered_ttl_s
    bench.intake.mark_delivered(FutureId(f"{MODEL}:0"))
    await until(lambda: 0 < bench.raw.ttl(key) <= Limits().delivered_ttl_s)


async def test_acknowledgements_that_were_not_sent_yet_are_sent_before_the_intake_closes(
    joblog_url: str, engine_name: str
) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=400)) as bench:
        await bench.ready()
        for seq in range(1, 301):
            await bench.submit(seq)
        bench.commit(bench.log()[1:])
        for seq in range(1, 301):
            bench.intake.mark_delivered(FutureId(f"{MODEL}:{seq}"))
    raw = redis.Redis.from_url(joblog_url, protocol=2)
    lives = [cast("int", raw.ttl(bench.keys.future(FutureId(f"{MODEL}:{seq}")))) for seq in range(1, 301)]
    raw.close()
    assert all(0 < life <= Limits().delivered_ttl_s for life in lives)


def _card() -> EngineCard:
    return EngineCard(
        model_name="tiny",
        model_aliases=[],
        tokenizer_id="tiny",
        architecture="llama",
        vocab_size=8,
        max_context_tokens=16,
        max_lora_rank=8,
        num_ranks=1,
        epoch=1,
        fingerprint="f",
        losses=[],
    )
