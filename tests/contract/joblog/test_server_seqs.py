"""Jobs that the server numbers: order of arrival, no holes, repeated requests, models that are made again."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from tests.support.joblog_bench import Bench, ready

from gradstream.shared.errors import QueueFull, SequenceConflict, UnknownModel
from gradstream.shared.ids import LOCAL_TENANT, ModelId, TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus, Receipt, RecordKind, RecordWrite, Submission

NAME = ModelId("default")
RECORD = {"base_model": "tiny", "session": NAME, "created_ms": "1"}


def submission(op: str = "optim_step", payload: bytes = b"payload", **options: object) -> Submission:
    if op == "create_model":
        options.setdefault("model_record", RECORD)
    return Submission(
        owner=NAME, seq=None, op=op, tenant=options.pop("tenant", LOCAL_TENANT), payload=payload, **options
    )


async def send(bench: Bench, op: str = "optim_step", payload: bytes = b"payload", **options: object) -> Receipt:
    return await bench.intake.submit(submission(op, payload, **options))


def seqs(bench: Bench) -> list[int]:
    return bench.seqs(NAME)


async def state(bench: Bench) -> str:
    return (await bench.record(NAME))["state"]


def commit_next(bench: Bench, **fields: str) -> None:
    """Commit the oldest open job with these fields of the model's record."""
    entry = next(entry for entry in bench.log() if entry.is_open)
    records = [RecordWrite(kind=RecordKind.MODEL, record_id=NAME, fields=fields)] if fields else []
    bench.commit([entry], records=records)


async def test_jobs_get_the_seqs_0_1_2_in_order_of_arrival(bench: Bench) -> None:
    receipts = [await send(bench, "create_model"), await send(bench), await send(bench)]
    assert [receipt.future_id for receipt in receipts] == ["default:0", "default:1", "default:2"]
    assert all(receipt.status is FutureStatus.QUEUED and not receipt.is_duplicate for receipt in receipts)
    assert seqs(bench) == [0, 1, 2]


async def test_many_at_once_leave_no_hole_and_no_double(bench: Bench) -> None:
    await send(bench, "create_model")
    receipts = await asyncio.gather(*(send(bench, payload=b"%d" % number) for number in range(100)))
    assert sorted(int(receipt.future_id.split(":")[1]) for receipt in receipts) == list(range(1, 101))
    assert seqs(bench) == list(range(101))
    payload_of = {entry.job.future_id: entry.job.payload for entry in bench.log()}
    assert [payload_of[receipt.future_id] for receipt in receipts] == [b"%d" % number for number in range(100)]


async def test_the_same_payload_without_a_key_is_a_new_job_each_time(bench: Bench) -> None:
    await send(bench, "create_model")
    assert {(await send(bench)).future_id for _ in range(3)} == {"default:1", "default:2", "default:3"}


async def test_the_same_submission_sent_twice_is_one_job(bench: Bench) -> None:
    await send(bench, "create_model")
    one = submission()
    first, second = await bench.intake.submit(one), await bench.intake.submit(one)
    assert (first.future_id, second.future_id) == ("default:1", "default:1")
    assert second.is_duplicate
    assert seqs(bench) == [0, 1]


async def test_a_creation_sent_twice_is_one_job(bench: Bench) -> None:
    one = submission("create_model")
    first, second = await bench.intake.submit(one), await bench.intake.submit(one)
    assert first.future_id == second.future_id == "default:0"
    assert seqs(bench) == [0]


async def test_a_large_payload_arrives_whole_and_its_retry_is_the_same_job(bench: Bench) -> None:
    await send(bench, "create_model")
    payload = bytes(range(256)) * 400
    first = await send(bench, payload=payload, retry_key="7")
    second = await send(bench, payload=payload, retry_key="7")
    assert first.future_id == second.future_id
    assert bench.log()[-1].job.payload == payload


async def test_a_request_repeated_before_its_future_was_asked_for_is_the_same_job(bench: Bench) -> None:
    await send(bench, "create_model")
    first = await send(bench, retry_key="1")
    again = await send(bench, retry_key="1")
    assert again.future_id == first.future_id
    assert again.is_duplicate
    assert seqs(bench) == [0, 1]


async def test_a_client_that_starts_again_with_1_gets_new_jobs(bench: Bench) -> None:
    await send(bench, "create_model")
    first = await send(bench, retry_key="1")
    await bench.intake.note_polled(first.future_id, tenant=TenantId("other"))
    assert (await send(bench, retry_key="1")).future_id == first.future_id, "a stranger's question means nothing"
    await bench.intake.note_polled(first.future_id, tenant=LOCAL_TENANT)
    again = await send(bench, retry_key="1")
    assert again.future_id == "default:2"
    assert (await send(bench, retry_key="1")).future_id == "default:2"


async def test_the_same_number_with_another_payload_is_another_job(bench: Bench) -> None:
    await send(bench, "create_model")
    await send(bench, payload=b"one", retry_key="1")
    assert (await send(bench, payload=b"two", retry_key="1")).future_id == "default:2"


async def test_a_repeated_request_is_found_after_its_job_ran(bench: Bench) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="ready")
    first = await send(bench, retry_key="1")
    commit_next(bench)
    again = await send(bench, retry_key="1")
    assert (again.future_id, again.status) == (first.future_id, FutureStatus.DONE)


async def test_a_refused_submission_uses_no_seq(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=2)) as bench:
        await send(bench, "create_model")
        await send(bench)
        with pytest.raises(QueueFull):
            await send(bench)
        commit_next(bench, state="ready")
        assert (await send(bench)).future_id == "default:2"


async def test_a_model_that_does_not_exist_is_unknown(bench: Bench) -> None:
    with pytest.raises(UnknownModel):
        await send(bench)


async def test_another_tenants_model_is_unknown_and_stays_as_it_is(bench: Bench) -> None:
    await send(bench, "create_model")
    for op in ("optim_step", "create_model", "unload_model"):
        with pytest.raises(UnknownModel):
            await send(bench, op, tenant=TenantId("other"))
    assert seqs(bench) == [0]


async def test_a_model_that_exists_is_not_made_again(bench: Bench) -> None:
    await send(bench, "create_model")
    with pytest.raises(SequenceConflict, match="default exists already"):
        await send(bench, "create_model", b"other")
    assert seqs(bench) == [0]


async def test_behind_an_unload_that_waits_the_model_takes_nothing(bench: Bench) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="ready")
    await send(bench, "unload_model", b"unload")
    with pytest.raises(UnknownModel, match="was unloaded"):
        await send(bench)
    assert await state(bench) == "ready"


async def test_behind_an_unload_that_waits_the_model_can_be_made_again(bench: Bench) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="ready")
    await send(bench, "unload_model", b"unload")
    assert (await send(bench, "create_model", b"second")).future_id == "default:2"
    assert await state(bench) == "ready", "what is in memory is still the first one"
    assert (await send(bench)).future_id == "default:3"
    with pytest.raises(SequenceConflict):
        await send(bench, "create_model", b"third")
    commit_next(bench, state="unloaded")
    assert (await send(bench)).future_id == "default:4", "the second one is on its way"
    commit_next(bench, state="ready")
    assert await state(bench) == "ready"
    assert seqs(bench) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("end", ["unloaded", "failed", "lost"])
async def test_a_model_that_ended_can_be_made_again_and_its_seqs_go_on(bench: Bench, end: str) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="ready")
    if end == "unloaded":
        await send(bench, "unload_model", b"unload")
        commit_next(bench, state="unloaded")
    else:
        await send(bench)
        commit_next(bench, state=end, error="why")
    receipt = await send(bench, "create_model", b"second", model_record={**RECORD, "rank": "16"})
    assert receipt.future_id == "default:2"
    record = await bench.record(NAME)
    assert record["state"] == "creating"
    assert record["rank"] == "16"
    assert "error" not in record


async def test_a_second_creation_is_refused_while_the_first_repair_waits(bench: Bench) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="failed", error="why")
    await send(bench, "create_model", b"second")
    with pytest.raises(SequenceConflict):
        await send(bench, "create_model", b"third")


async def test_a_model_whose_record_was_removed_goes_on_behind_its_old_seqs(bench: Bench) -> None:
    await send(bench, "create_model")
    commit_next(bench, state="ready")
    await send(bench, "unload_model", b"unload")
    commit_next(bench, state="unloaded")
    assert await bench.intake.remove_record(RecordKind.MODEL, NAME)
    assert (await send(bench, "create_model")).future_id == "default:2"
    assert (await send(bench)).future_id == "default:3"


async def test_a_job_without_order_needs_a_seq(bench: Bench) -> None:
    with pytest.raises(ValueError, match="needs a seq"):
        await bench.intake.submit(submission(ordered=False))


@pytest.fixture
async def short(joblog_url: str, engine_name: str) -> AsyncIterator[Bench]:
    async with Bench.running(joblog_url, engine_name, Limits(retry_window_s=1)) as bench:
        yield bench


async def test_after_the_window_the_same_request_is_a_new_job(short: Bench) -> None:
    await send(short, "create_model")
    await send(short, retry_key="1")
    deadline = asyncio.get_running_loop().time() + 60
    while short.raw.keys(short.keys.prefix.replace("{", "\\{") + "again:*"):
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    assert (await send(short, retry_key="1")).future_id == "default:2"


async def test_a_model_that_the_client_numbers_is_untouched_by_all_this(bench: Bench) -> None:
    await bench.create()
    bench.commit(bench.log(), records=[ready()])
    assert (await bench.submit(1)).future_id == "s1:train:0:1"
    assert "tail" not in await bench.record()


async def test_a_redis_that_lost_everything_goes_on_behind_what_it_gets_back(bench: Bench) -> None:
    for op in ("create_model", "optim_step", "unload_model", "create_model", "optim_step"):
        await send(bench, op, op.encode())
    log = bench.log()
    bench.raw.flushall()
    bench.epoch = bench.feed.acquire(owner="next-gang", above=bench.epoch)
    for entry in log:
        assert bench.feed.restore(entry, epoch=bench.epoch)
    assert seqs(bench) == [0, 1, 2, 3, 4]
    record = await bench.record(NAME)
    assert (record["tail"], record["made_at"], record["next_seq"]) == ("live", "3", "5")
    assert (await send(bench)).future_id == "default:5"
    with pytest.raises(SequenceConflict):
        await send(bench, "create_model", b"another")


async def test_a_model_that_ended_before_redis_was_lost_takes_nothing_after_it_was_filled_again(bench: Bench) -> None:
    for op in ("create_model", "unload_model"):
        await send(bench, op, op.encode())
    log = bench.log()
    bench.raw.flushall()
    bench.epoch = bench.feed.acquire(owner="next-gang", above=bench.epoch)
    for entry in log:
        bench.feed.restore(entry, epoch=bench.epoch)
    with pytest.raises(UnknownModel):
        await send(bench)
    assert (await send(bench, "create_model", b"second")).future_id == "default:2"
