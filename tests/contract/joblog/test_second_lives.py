"""What a lost Redis gets back of models that were made more than once, and of requests that may come again."""

import pytest
from tests.support.joblog_bench import Bench

from gradstream.shared.ids import LOCAL_TENANT, ModelId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import LogEntry, Receipt, RecordKind, RecordWrite, Submission

NAME = ModelId("default")
FIRST = {"base_model": "tiny", "session": NAME, "created_ms": "1", "rank": "4", "spec": "first"}
SECOND = {**FIRST, "created_ms": "2", "rank": "8", "spec": "second"}
MODEL_OPS = ("create_model", "unload_model", "create_model", "optim_step")


async def send(bench: Bench, op: str, record: dict[str, str] | None = None, *, retry_key: str = "") -> Receipt:
    return await bench.intake.submit(
        Submission(
            owner=NAME,
            seq=None,
            op=op,
            tenant=LOCAL_TENANT,
            payload=op.encode(),
            model_record=record,
            retry_key=retry_key,
        )
    )


async def two_lives(bench: Bench) -> list[LogEntry]:
    for op, record in zip(MODEL_OPS, (FIRST, None, SECOND, None), strict=True):
        await send(bench, op, record)
    return bench.log()


def lose_all(bench: Bench) -> None:
    bench.raw.flushall()
    bench.epoch = bench.feed.acquire(owner="next-gang", above=bench.epoch)


def context(fields: dict[str, str]) -> RecordWrite:
    return RecordWrite(kind=RecordKind.MODEL, record_id=NAME, fields=fields)


async def described(bench: Bench) -> tuple[str, str]:
    record = await bench.record(NAME)
    return record["rank"], record["spec"]


async def test_a_model_made_twice_has_the_record_of_its_second_creation_also_while_that_waits(bench: Bench) -> None:
    log = await two_lives(bench)
    lose_all(bench)
    for entry in log:
        bench.feed.restore(entry, epoch=bench.epoch)
    assert await described(bench) == ("8", "second")
    assert [entry.record for entry in bench.log()] == [entry.record for entry in log]
    assert log[2].record == SECOND


def without_record(entry: LogEntry) -> LogEntry:
    """The entry as an older log on disk has it."""
    return LogEntry(entry_id=entry.entry_id, job=entry.job, ordered=True, at_ms=entry.at_ms)


async def test_the_context_of_a_later_creation_replaces_that_of_an_earlier_one_and_never_the_other_way_round(
    bench: Bench,
) -> None:
    log = await two_lives(bench)
    lose_all(bench)
    for entry in log:
        bench.feed.restore(without_record(entry), epoch=bench.epoch)
    assert bench.feed.restore_record(context(FIRST), epoch=bench.epoch, made_by=0)
    assert bench.feed.restore_record(context(SECOND), epoch=bench.epoch, made_by=2)
    assert not bench.feed.restore_record(context(SECOND), epoch=bench.epoch, made_by=2)
    assert not bench.feed.restore_record(context(FIRST), epoch=bench.epoch, made_by=0)
    assert await described(bench) == ("8", "second")
    record = await bench.record(NAME)
    assert (record["tail"], record["made_at"], record["next_seq"]) == ("live", "2", "4")


async def test_a_record_that_is_there_is_not_put_back_to_an_earlier_creation(bench: Bench) -> None:
    await two_lives(bench)
    assert not bench.feed.restore_record(context(FIRST), epoch=bench.epoch, made_by=0)
    assert await described(bench) == ("8", "second")


async def test_what_a_scan_of_the_checkpoints_made_is_replaced_by_what_the_log_knows(bench: Bench) -> None:
    log = await two_lives(bench)
    lose_all(bench)
    scanned = {**FIRST, "tenant": LOCAL_TENANT, "state": "unloaded", "next_seq": "0", "applied": "-1", "scanned": "1"}
    await bench.intake.add_record(RecordKind.MODEL, NAME, {**scanned, "spec": ""})
    bench.feed.restore(without_record(log[0]), epoch=bench.epoch)
    assert bench.feed.restore_record(context(FIRST), epoch=bench.epoch, made_by=0)
    assert await described(bench) == ("4", "first")
    assert "scanned" not in await bench.record(NAME)


async def test_an_older_job_that_is_given_back_does_not_end_a_model_that_was_made_again(bench: Bench) -> None:
    log = await two_lives(bench)
    bench.feed.restore(log[1], epoch=bench.epoch)
    record = await bench.record(NAME)
    assert (record["tail"], record["made_at"]) == ("live", "2")


@pytest.mark.parametrize("is_open", [True, False])
async def test_a_request_sent_again_after_redis_was_lost_finds_the_job_that_was_given_back(
    bench: Bench, is_open: bool
) -> None:
    await send(bench, "create_model", FIRST)
    first = await send(bench, "forward_backward", retry_key="7")
    log = bench.log()
    lose_all(bench)
    for entry in log:
        given = LogEntry(
            entry_id=entry.entry_id, job=entry.job, is_open=is_open, ordered=True, at_ms=entry.at_ms, again=entry.again
        )
        bench.feed.restore(given, epoch=bench.epoch, ended_ms=entry.at_ms)
    again = await send(bench, "forward_backward", retry_key="7")
    assert (again.future_id, again.is_duplicate) == (first.future_id, True)
    await bench.intake.note_polled(first.future_id, tenant=LOCAL_TENANT)
    assert (await send(bench, "forward_backward", retry_key="7")).future_id == "default:2"


async def test_a_request_older_than_the_window_is_not_remembered_anew(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(retry_window_s=50)) as bench:
        await send(bench, "create_model", FIRST)
        await send(bench, "forward_backward", retry_key="7")
        log = bench.log()
        lose_all(bench)
        for entry in log:
            old = LogEntry(
                entry_id=entry.entry_id, job=entry.job, at_ms=entry.at_ms - 50_000, ordered=True, again=entry.again
            )
            bench.feed.restore(old, epoch=bench.epoch)
        assert (await send(bench, "forward_backward", retry_key="7")).future_id == "default:2"
