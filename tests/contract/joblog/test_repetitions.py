"""Which request is the repetition of an earlier one, where the server numbers a model's jobs."""

from dataclasses import replace

import pytest
from tests.support.joblog_bench import Bench

from gradstream.shared.errors import QueueFull, UnknownModel
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus, Receipt, RecordKind, RecordWrite, Submission

NAME = ModelId("default")
RECORD = {"base_model": "tiny", "session": NAME, "created_ms": "1"}
LONG_AGO_MS = 60_000


def request(op: str, *, age_ms: int = 0, retry_key: str = "1") -> Submission:
    """The same request each time; age_ms: how long ago it arrived."""
    record = RECORD if op == "create_model" else None
    return Submission(
        owner=NAME,
        seq=None,
        op=op,
        tenant=LOCAL_TENANT,
        payload=op.encode(),
        retry_key=retry_key,
        age_ms=age_ms,
        model_record=record,
    )


async def send(bench: Bench, op: str, *, age_ms: int = 0, retry_key: str = "1") -> Receipt:
    return await bench.intake.submit(request(op, age_ms=age_ms, retry_key=retry_key))


def commit_next(bench: Bench, **fields: str) -> None:
    """Commit the oldest open job with these fields of the model's record."""
    entry = next(entry for entry in bench.log() if entry.is_open)
    bench.commit([entry], records=[RecordWrite(kind=RecordKind.MODEL, record_id=NAME, fields=fields)] if fields else [])


async def poll(bench: Bench, future_id: FutureId) -> None:
    await bench.intake.note_polled(future_id, tenant=LOCAL_TENANT)


async def test_a_request_that_waited_for_room_while_its_retry_was_accepted_and_asked_for_is_no_second_job(
    joblog_url: str, engine_name: str
) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=1)) as bench:
        await send(bench, "create_model")
        first = request("forward_backward")
        with pytest.raises(QueueFull):
            await bench.intake.submit(first)
        commit_next(bench, state="ready")
        retry = await send(bench, "forward_backward")
        await poll(bench, retry.future_id)
        commit_next(bench)
        late = await bench.intake.submit(replace(first, age_ms=LONG_AGO_MS))
        assert (late.future_id, late.is_duplicate) == (retry.future_id, True)
        assert bench.seqs(NAME) == [0, 1]


async def test_the_first_time_that_a_client_asks_counts(bench: Bench) -> None:
    await send(bench, "create_model")
    first = await send(bench, "optim_step")
    await poll(bench, first.future_id)
    stored = {name: bench.raw.get(name) for name in _again(bench)}
    await poll(bench, first.future_id)
    assert {name: bench.raw.get(name) for name in _again(bench)} == stored
    assert all(0 < bench.raw.ttl(name) <= Limits().retry_window_s for name in _again(bench))


async def test_asking_for_an_older_job_of_the_same_request_leaves_the_newer_one_unasked(bench: Bench) -> None:
    await send(bench, "create_model")
    older = await send(bench, "optim_step")
    for name in _again(bench):
        bench.raw.delete(name)
    newer = await send(bench, "optim_step")
    await poll(bench, older.future_id)
    assert (await send(bench, "optim_step")).future_id == newer.future_id


async def test_a_job_of_the_models_life_before_is_not_the_answer_in_the_next_one(bench: Bench) -> None:
    await send(bench, "create_model")
    await send(bench, "forward_backward")
    await send(bench, "unload_model", retry_key="")
    await send(bench, "create_model", retry_key="9")
    again = await send(bench, "forward_backward")
    assert (again.future_id, again.is_duplicate) == ("default:4", False)
    assert (await send(bench, "forward_backward")).future_id == "default:4"


async def test_a_creation_that_nobody_asked_for_makes_an_ended_model_again(bench: Bench) -> None:
    await send(bench, "create_model")
    await send(bench, "unload_model", retry_key="")
    again = await send(bench, "create_model")
    assert (again.future_id, again.is_duplicate) == ("default:2", False)
    assert (await send(bench, "create_model")).future_id == "default:2"


@pytest.mark.parametrize("end", ["failed", "lost"])
async def test_a_creation_that_nobody_asked_for_makes_a_broken_model_again(bench: Bench, end: str) -> None:
    await send(bench, "create_model")
    commit_next(bench, state=end, error="why")
    assert (await send(bench, "create_model")).future_id == "default:1"
    assert (await send(bench, "create_model")).future_id == "default:1", "this one is on its way"


async def test_behind_an_unload_a_new_request_is_refused_though_one_like_it_was_not_asked_for(bench: Bench) -> None:
    await send(bench, "create_model")
    await send(bench, "forward_backward")
    await send(bench, "unload_model", retry_key="2")
    with pytest.raises(UnknownModel):
        await send(bench, "forward_backward")
    assert (await send(bench, "unload_model", retry_key="2")).future_id == "default:2"


async def test_a_request_that_waited_over_the_end_of_its_model_is_no_job_of_the_next_one(bench: Bench) -> None:
    await send(bench, "create_model")
    first = await send(bench, "forward_backward")
    await send(bench, "unload_model", retry_key="")
    assert (await send(bench, "forward_backward", age_ms=LONG_AGO_MS)).future_id == first.future_id
    await send(bench, "create_model", retry_key="9")
    assert (await send(bench, "forward_backward", age_ms=LONG_AGO_MS)).future_id == first.future_id
    assert bench.seqs(NAME) == [0, 1, 2, 3]


async def test_a_model_that_only_a_scan_of_the_checkpoints_knows_can_be_made_and_made_again(bench: Bench) -> None:
    scanned = {"tenant": LOCAL_TENANT, "state": "unloaded", "next_seq": "0", **RECORD}
    assert await bench.intake.add_record(RecordKind.MODEL, NAME, scanned)
    await send(bench, "create_model")
    record = await bench.record(NAME)
    assert (record["applied"], record["queued"], record["held"]) == ("-1", "1", "0")
    commit_next(bench, state="failed", error="why")
    again = await send(bench, "create_model", retry_key="2")
    assert (again.future_id, again.status) == ("default:1", FutureStatus.QUEUED)


def _again(bench: Bench) -> list[str]:
    return list(bench.raw.scan_iter(match=bench.keys.prefix.replace("{", "\\{") + "again:*", count=1000))
