"""A Redis that lost something, or everything, gets it back: nothing stays held, unread or locked out."""

from dataclasses import replace

import pytest
from tests.support.joblog_bench import MODEL, Bench, ready

from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, future_id
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import (
    BatchId,
    Commit,
    Ended,
    FutureStatus,
    LogEntry,
    RecordKind,
    RecordWrite,
    Submission,
    TailLost,
)
from gradstream.shared.wire import OptimStepDone

_DONE = OptimStepDone(metrics={"loss": 0.5})


async def test_jobs_accepted_after_a_refill_come_behind_its_cursor(bench: Bench) -> None:
    entries = await _entries(bench, 3)
    _lose_all(bench)
    # Entries 4 to 9 were samples that were cancelled: the cursor moved over them, and no log knows them.
    _refill(bench, entries, cursor="9-0")
    await bench.submit(3)
    assert [entry.job.seq for entry in _unread(bench)] == [3]


async def test_jobs_accepted_before_the_refill_are_read_after_it(bench: Bench) -> None:
    entries = await _entries(bench, 3)
    _lose_all(bench)
    early, inline = ModelId("s2:train:0"), b"in the meantime"
    await bench.create(early)
    await bench.submit(1, inline, model=early)
    _refill(bench, entries, cursor="9-0")
    assert [(entry.job.owner, entry.job.seq, entry.is_open) for entry in _unread(bench)] == [
        (early, 0, True),
        (early, 1, True),
    ]
    assert _unread(bench)[1].job.payload == inline


async def test_outcomes_that_are_given_back_count_for_no_tenant_and_are_there_for_who_waits(
    joblog_url: str, engine_name: str
) -> None:
    limits = Limits(max_unread_bytes_per_tenant=600, delivered_ttl_s=60)
    async with Bench.running(joblog_url, engine_name, limits) as bench:
        entries = await _entries(bench, 1)
        await bench.submit(1)
        entries = bench.log()
        _lose_all(bench)
        hour_ago = _now_ms(bench) - 3_600_000
        _refill(bench, entries, ended_ms=hour_ago)
        assert (await bench.view(1)).status is FutureStatus.DONE
        assert bench.raw.hget(f"{bench.keys.prefix}unread", LOCAL_TENANT) is None
        left_s = bench.raw.ttl(bench.keys.future(future_id(MODEL, 1)))
        assert limits.unread_ttl_s - 3700 < left_s <= limits.unread_ttl_s - 3600
        assert (await bench.submit(2)).status is FutureStatus.QUEUED


async def test_an_outcome_given_back_at_the_end_of_its_life_still_lives_as_long_as_a_delivered_one(
    bench: Bench,
) -> None:
    entries = await _entries(bench, 2)
    _lose_all(bench)
    _refill(bench, entries, ended_ms=_now_ms(bench) - 1000 * Limits().unread_ttl_s + 20_000)
    left_s = bench.raw.ttl(bench.keys.future(future_id(MODEL, 1)))
    assert Limits().delivered_ttl_s - 60 < left_s <= Limits().delivered_ttl_s


async def test_of_a_job_that_ended_too_long_ago_only_its_place_is_given_back(bench: Bench) -> None:
    entries = await _entries(bench, 3)
    _lose_all(bench)
    _refill(bench, entries, ended_ms=_now_ms(bench) - 1000 * Limits().unread_ttl_s - 1)
    assert bench.feed.unknown([entry.job.future_id for entry in entries]) == {one.job.future_id for one in entries}
    record = await bench.record()
    assert (record["state"], record["next_seq"], record["applied"], record["queued"]) == ("ready", "3", "2", "0")
    assert bench.feed.last_batch() == BatchId(1, 1)
    assert (await bench.submit(1)).is_duplicate
    assert (await bench.submit(3)).status is FutureStatus.QUEUED


async def test_what_a_dead_gang_had_only_logged_counts_as_unread(bench: Bench) -> None:
    entries = await _entries(bench, 2)
    old, bench.epoch = bench.epoch, bench.feed.acquire(owner="test-gang")
    bench.feed.commit(_make_up(bench, entries, batch=BatchId(old, 1), ended_ms=_now_ms(bench)))
    assert int(bench.raw.hget(f"{bench.keys.prefix}unread", LOCAL_TENANT) or 0) > 0


async def test_jobs_that_were_held_for_restored_ones_go_to_the_log_behind_them(bench: Bench) -> None:
    entries = await _entries(bench, 6)
    _lose_all(bench)
    _restore(bench, entries[:2])
    for seq in (7, 6):
        assert (await bench.submit(seq)).status is FutureStatus.HELD
    _restore(bench, entries[2:4])
    _restore(bench, entries[4:], is_open=True)
    assert [entry.job.seq for entry in bench.log() if entry.is_open] == [4, 5, 6, 7]
    record = await bench.record()
    assert (record["held"], record["next_seq"]) == ("0", "8")
    assert (await bench.intake.fail_gaps()) == 0


async def test_a_held_retry_of_an_executed_job_gets_its_outcome(bench: Bench) -> None:
    entries = await _entries(bench, 4)
    _lose_all(bench)
    _restore(bench, entries[:2])
    assert (await bench.submit(3)).status is FutureStatus.HELD
    _refill(bench, entries)
    assert (await bench.view(3)).status is FutureStatus.DONE
    assert (await bench.record())["held"] == "0"
    assert _unread(bench) == []


async def test_a_held_job_below_a_restored_one_is_not_held_for_ever(bench: Bench) -> None:
    entries = await _entries(bench, 5)
    _lose_all(bench)
    _restore(bench, entries[:2])
    assert (await bench.submit(3, b"new")).status is FutureStatus.HELD
    _restore(bench, entries[4:])
    assert (await bench.view(3)).status is FutureStatus.QUEUED
    record = await bench.record()
    assert (record["held"], record["next_seq"]) == ("0", "5")


async def test_a_restored_session_was_heard_of_now_and_its_model_was_used_now(bench: Bench) -> None:
    entries = await _entries(bench, 2)
    _lose_all(bench)
    now_ms = _now_ms(bench)
    _restore(bench, entries)
    fields = {"tenant": LOCAL_TENANT, "created_ms": "1", "heartbeat_ms": "5"}
    session = RecordWrite(kind=RecordKind.SESSION, record_id="s1", fields=fields)
    assert bench.feed.restore_record(session, epoch=bench.epoch)
    restored = await bench.intake.record(RecordKind.SESSION, "s1")
    assert restored is not None
    assert int(restored["heartbeat_ms"]) >= now_ms
    assert int((await bench.record())["used_ms"]) >= now_ms


async def test_a_session_that_is_there_keeps_its_heartbeat(bench: Bench) -> None:
    fields = {"tenant": LOCAL_TENANT, "created_ms": "1", "heartbeat_ms": "5"}
    await bench.intake.put_record(RecordKind.SESSION, "s1", fields)
    session = RecordWrite(kind=RecordKind.SESSION, record_id="s1", fields=fields)
    assert not bench.feed.restore_record(session, epoch=bench.epoch)
    assert await bench.intake.record(RecordKind.SESSION, "s1") == fields


async def test_a_commit_behind_a_journal_that_lost_its_end_changes_nothing(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    (entry,) = _unread(bench)
    commit = replace(_make_up(bench, [entry], batch=BatchId(bench.epoch, 5), ended_ms=0), batch=None, number=5)
    with pytest.raises(TailLost, match=f"made after batch {bench.epoch}-4, and the journal .* ends at {bench.epoch}-1"):
        bench.feed.commit(replace(commit, after=BatchId(bench.epoch, 4)))
    assert (await bench.view(1)).status is FutureStatus.QUEUED
    for _ in range(2):
        bench.feed.commit(replace(commit, after=BatchId(bench.epoch, 1)))
    assert (await bench.view(1)).status is FutureStatus.DONE
    assert bench.raw.xlen(bench.keys.journal) == 2


async def test_the_newest_entry_is_known_also_when_the_log_is_empty(bench: Bench) -> None:
    assert bench.feed.newest_entry() == 0
    await _entries(bench, 2)
    bench.raw.xtrim(bench.keys.log, maxlen=0)
    assert bench.feed.newest_entry() == 2


async def test_a_batch_whose_payload_expired_is_not_whole(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(inline_bytes=8)) as bench:
        await bench.create()
        await bench.submit(1, b"longer than what stands in the stream")
        bench.commit(bench.log(), records=[ready()])
        (whole,) = bench.feed.journaled(BatchId(0, 0), count=10)
        assert (len(whole.entries), whole.num_gone) == (2, 0)
        (blob,) = bench.raw.scan_iter(match=bench.keys.prefix.replace("{", "\\{") + "blob:*", count=1000)
        bench.raw.delete(blob)
        (torn,) = bench.feed.journaled(BatchId(0, 0), count=10)
        assert ([entry.job.seq for entry in torn.entries], torn.num_gone) == ([0], 1)


async def _entries(bench: Bench, num_jobs: int) -> list[LogEntry]:
    """That many jobs of the model, as a gang reads them."""
    await bench.create()
    for seq in range(1, num_jobs):
        await bench.intake.submit(
            Submission(owner=MODEL, seq=seq, op="optim_step", tenant=LOCAL_TENANT, payload=b"payload")
        )
    return bench.log()


def _unread(bench: Bench) -> list[LogEntry]:
    return bench.feed.read(bench.feed.cursor(), count=1000, block_ms=0)


def _lose_all(bench: Bench) -> None:
    """As FLUSHALL does, for the keys of this engine; a new gang leads then."""
    for key in list(bench.raw.scan_iter(match=bench.keys.prefix.replace("{", "\\{") + "*", count=1000)):
        bench.raw.delete(key)
    bench.epoch = bench.feed.acquire(owner="test-gang", above=bench.epoch)


def _restore(bench: Bench, entries: list[LogEntry], *, is_open: bool = False, ended_ms: int | None = None) -> None:
    at_ms = _now_ms(bench) if ended_ms is None else ended_ms
    for entry in entries:
        bench.feed.restore(replace(entry, is_open=is_open), epoch=bench.epoch, ended_ms=at_ms)


def _refill(bench: Bench, entries: list[LogEntry], *, cursor: str | None = None, ended_ms: int | None = None) -> None:
    """Give back jobs that ended in one batch, with their outcomes, as a take-over does."""
    at_ms = _now_ms(bench) if ended_ms is None else ended_ms
    missing: set[FutureId] = bench.feed.unknown([entry.job.future_id for entry in entries])
    _restore(bench, [entry for entry in entries if entry.job.future_id in missing], ended_ms=at_ms)
    commit = _make_up(bench, entries, batch=BatchId(1, 1), ended_ms=at_ms)
    bench.feed.commit(replace(commit, cursor=cursor or commit.cursor, records=[ready()]))


def _make_up(bench: Bench, entries: list[LogEntry], *, batch: BatchId, ended_ms: int) -> Commit:
    return Commit(
        epoch=bench.epoch,
        number=0,
        batch=batch,
        outcomes=[Ended.of(entry.job, _DONE) for entry in entries],
        plan=b"plan",
        cursor=entries[-1].entry_id,
        at_ms=ended_ms,
    )


def _now_ms(bench: Bench) -> int:
    seconds, micros = bench.raw.time()
    return int(seconds) * 1000 + int(micros) // 1000
