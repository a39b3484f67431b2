"""Order, idempotency, conflicts and ownership at the entrance of the log."""

import asyncio
import random

import pytest
from tests.support.joblog_bench import MODEL, Bench

from gradstream.shared import codec
from gradstream.shared.errors import PayloadTooLarge, SequenceConflict, UnknownModel
from gradstream.shared.ids import ModelId, SamplerId, TenantId
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus, RecordKind, RecordWrite, Submission
from gradstream.shared.wire import Failed

OTHER = TenantId("other")


async def test_a_models_record_begins_in_state_creating_with_the_submissions_fields(bench: Bench) -> None:
    receipt = await bench.create()
    assert (receipt.future_id, receipt.status, receipt.is_duplicate) == (f"{MODEL}:0", FutureStatus.QUEUED, False)
    record = await bench.record()
    assert record["state"] == "creating"
    assert record["base_model"] == "tiny"
    assert record["tenant"] == "local"
    assert (record["next_seq"], record["queued"], record["held"]) == ("1", "1", "0")


async def test_jobs_that_arrive_out_of_order_are_logged_in_seq_order(bench: Bench) -> None:
    await bench.create()
    statuses = [(await bench.submit(seq, b"%d" % seq)).status for seq in (4, 2, 3)]
    assert statuses == [FutureStatus.HELD] * 3
    assert bench.seqs() == [0]
    assert (await bench.view(3)).waiting_for_seq == 1
    await bench.submit(1, b"1")
    assert bench.seqs() == [0, 1, 2, 3, 4]
    assert [entry.job.payload for entry in bench.log()[1:]] == [b"1", b"2", b"3", b"4"]
    assert (await bench.view(4)).status is FutureStatus.QUEUED
    assert (await bench.record())["held"] == "0"


async def test_concurrent_submissions_make_a_gap_free_log_in_order(bench: Bench) -> None:
    await bench.create()
    order = list(range(1, 101))
    await asyncio.gather(*(bench.submit(seq, b"%d" % seq) for seq in reversed(order)))
    assert bench.seqs() == [0, *order]
    assert [entry.entry_id for entry in bench.log()] == [f"{n}-0" for n in range(1, 102)]


async def test_the_same_submission_again_is_the_same_future(bench: Bench) -> None:
    await bench.create()
    first = await bench.submit(1)
    again = await bench.submit(1)
    assert (again.future_id, again.is_duplicate) == (first.future_id, True)
    assert bench.seqs() == [0, 1]
    assert (await bench.create()).is_duplicate


async def test_the_same_submission_is_recognised_after_it_ran_and_after_its_result_expired(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(1)
    bench.commit(bench.log()[1:])
    assert (await bench.submit(1)).status is FutureStatus.DONE
    bench.raw.delete(bench.keys.future(f"{MODEL}:1"))
    receipt = await bench.submit(1)
    assert (receipt.status, receipt.is_duplicate) == (FutureStatus.DONE, True)
    assert bench.seqs() == [0, 1]


async def test_a_held_submission_again_is_a_duplicate(bench: Bench) -> None:
    await bench.create()
    await bench.submit(5)
    again = await bench.submit(5)
    assert (again.status, again.is_duplicate) == (FutureStatus.HELD, True)
    assert (await bench.record())["held"] == "1"


@pytest.mark.parametrize("seq", [1, 5], ids=["queued", "held"])
async def test_another_payload_under_a_used_seq_is_a_conflict_and_changes_nothing(bench: Bench, seq: int) -> None:
    await bench.create()
    await bench.submit(seq, b"first")
    before = (bench.num_keys(), await bench.record(), bench.seqs())
    with pytest.raises(SequenceConflict, match=f"seq_id {seq} of .* another payload"):
        await bench.submit(seq, b"second")
    assert (bench.num_keys(), await bench.record(), bench.seqs()) == before


async def test_a_conflict_is_still_found_after_the_first_ones_result_expired(bench: Bench) -> None:
    await bench.ready()
    bench.raw.delete(bench.keys.future(f"{MODEL}:0"))
    with pytest.raises(SequenceConflict):
        await bench.submit(0, b"something else")


async def test_a_used_seq_whose_digest_was_dropped_is_a_conflict(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(keep_seqs=2)) as bench:
        await bench.ready()
        for seq in (1, 2, 3, 4):
            await bench.submit(seq)
        bench.raw.delete(bench.keys.future(f"{MODEL}:1"))
        with pytest.raises(SequenceConflict, match="too old"):
            await bench.submit(1)
        assert bench.raw.hkeys(f"{bench.keys.prefix}seqs:{MODEL}") == ["3", "4"]


async def test_an_unknown_model_is_refused_and_leaves_no_key(bench: Bench) -> None:
    before = bench.num_keys()
    with pytest.raises(UnknownModel, match=MODEL):
        await bench.submit(1)
    with pytest.raises(UnknownModel):
        await bench.intake.refuse(model=MODEL, seq=1, tenant=TenantId("local"))
    assert bench.num_keys() == before


async def test_another_tenants_model_is_as_unknown_as_one_that_is_not_there(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1)
    for seq, payload in ((1, b"payload"), (2, b"new")):
        with pytest.raises(UnknownModel):
            await bench.submit(seq, payload, tenant=OTHER)
    with pytest.raises(UnknownModel):
        await bench.create(tenant=OTHER)
    with pytest.raises(UnknownModel):
        await bench.intake.refuse(model=MODEL, seq=2, tenant=OTHER)
    assert bench.seqs() == [0, 1]


async def test_a_second_model_under_the_same_id_is_a_conflict(bench: Bench) -> None:
    await bench.create()
    with pytest.raises(SequenceConflict, match="exists already"):
        await bench.submit(7, b"other", record={"base_model": "tiny"})


async def test_a_refused_seq_does_not_hold_up_later_ones_and_cannot_be_used(bench: Bench) -> None:
    await bench.create()
    await bench.submit(3, b"3")
    await bench.intake.refuse(model=MODEL, seq=2, tenant=TenantId("local"))
    await bench.intake.refuse(model=MODEL, seq=2, tenant=TenantId("local"))
    assert bench.seqs() == [0]
    await bench.intake.refuse(model=MODEL, seq=1, tenant=TenantId("local"))
    assert bench.seqs() == [0, 3]
    for seq in (1, 2):
        with pytest.raises(SequenceConflict, match="refused"):
            await bench.submit(seq)


async def test_refusing_a_seq_that_was_accepted_changes_nothing(bench: Bench) -> None:
    await bench.create()
    await bench.submit(2)
    for seq in (0, 2):
        await bench.intake.refuse(model=MODEL, seq=seq, tenant=TenantId("local"))
    assert (await bench.view(2)).status is FutureStatus.HELD
    await bench.submit(1)
    assert bench.seqs() == [0, 1, 2]


async def test_samples_need_no_model_and_run_in_order_of_arrival(bench: Bench) -> None:
    sampler = SamplerId("s1:sample:0")
    for seq in (1_000_000_000, 7, 7):
        await bench.intake.submit(
            Submission(owner=sampler, seq=seq, op="sample", tenant=TenantId("local"), payload=b"p", ordered=False)
        )
    assert [entry.job.seq for entry in bench.log()] == [1_000_000_000, 7]
    with pytest.raises(SequenceConflict):
        await bench.intake.submit(
            Submission(owner=sampler, seq=7, op="sample", tenant=TenantId("local"), payload=b"q", ordered=False)
        )
    bench.commit(bench.log())
    assert bench.raw.hgetall(f"{bench.keys.prefix}owners") == {}


async def test_a_large_payload_lies_beside_the_stream_compressed_and_comes_back_whole(bench: Bench) -> None:
    await bench.create()
    payload = bytes(range(256)) * 4000 + bench.keys.engine.encode()
    incompressible = random.Random(1).randbytes(40_000)
    await bench.submit(1, payload)
    await bench.submit(2, incompressible)
    entries = bench.log()
    assert [entries[1].job.payload, entries[2].job.payload] == [payload, incompressible]
    fields = bench.raw.xrange(bench.keys.log)[1][1]
    assert fields["enc"] == "zstd"
    assert int(fields["bytes"]) < len(payload) / 10


async def test_a_worker_gets_a_packed_payload_unpacked_and_as_it_was_stored(bench: Bench) -> None:
    await bench.create()
    large, small = b"tokens" * 10_000, b"tokens"
    await bench.submit(1, large)
    await bench.submit(2, small)
    _, first, second = bench.log()
    assert (first.job.payload, second.job.payload) == (large, small)
    assert codec.decompress(first.frame, max_bytes=len(large)) == large
    assert second.frame == b""


async def test_a_blob_lives_as_long_as_its_job_and_an_unaccepted_one_expires(bench: Bench) -> None:
    await bench.create()
    noise = [random.Random(seed).randbytes(60_000) for seed in range(2)]
    await bench.submit(1, noise[0])
    (blob,) = _blobs(bench)
    assert bench.raw.ttl(blob) == -1
    await bench.submit(1, noise[0])
    assert bench.raw.ttl(blob) == -1
    with pytest.raises(SequenceConflict):
        await bench.submit(1, noise[1])
    (orphan,) = set(_blobs(bench)) - {blob}
    assert 0 < bench.raw.ttl(orphan) <= Limits().orphan_blob_ttl_s
    assert bench.log()[1].job.payload == noise[0]
    bench.commit(bench.log())
    assert 0 < bench.raw.ttl(blob) <= Limits().keep_blob_s


async def test_a_job_whose_blob_is_gone_reads_as_an_empty_payload(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1, random.Random(1).randbytes(50_000))
    for blob in _blobs(bench):
        bench.raw.delete(blob)
    entry = bench.log()[1]
    assert (entry.job.payload, entry.is_open) == (b"", True)


@pytest.mark.parametrize(
    "limits",
    [Limits(max_payload_bytes=1000), Limits(max_queued_bytes_per_tenant=1000), Limits(max_queued_bytes=1000)],
    ids=["payload", "tenant", "queue"],
)
async def test_a_payload_that_could_never_fit_is_too_large(joblog_url: str, engine_name: str, limits: Limits) -> None:
    async with Bench.running(joblog_url, engine_name, limits) as bench:
        await bench.create()
        with pytest.raises(PayloadTooLarge, match="1001"):
            await bench.submit(1, bytes(n % 251 for n in range(1001)))


async def test_an_unloaded_or_removed_model_takes_no_jobs_and_its_held_ones_fail(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(3)
    bench.commit([], records=[RecordWrite(kind=RecordKind.MODEL, record_id=MODEL, fields={"state": "unloaded"})])
    with pytest.raises(UnknownModel, match="unloaded"):
        await bench.submit(1)
    bench.commit([], records=[RecordWrite(kind=RecordKind.MODEL, record_id=MODEL, fields=None)])
    with pytest.raises(UnknownModel):
        await bench.submit(1)
    failed = await bench.failure(3)
    assert isinstance(failed, Failed)
    assert failed.code == UnknownModel.code
    assert (await bench.create()).is_duplicate
    assert await bench.intake.record(RecordKind.MODEL, MODEL) is None


@pytest.mark.parametrize(("owner", "seq"), [("a b", 1), ("../x", 1), ("m", -1), ("m", 2**53)])
async def test_ids_that_cannot_be_stored_are_a_callers_mistake(bench: Bench, owner: str, seq: int) -> None:
    with pytest.raises(ValueError, match=r"owner|seq"):
        await bench.submit(seq, model=ModelId(owner))


def _blobs(bench: Bench) -> list[str]:
    return [str(key) for key in bench.raw.scan_iter(match="gs:{" + bench.keys.engine + "}:blob:*", count=1000)]
