"""Lanes: processes that train one model each have an order of their own in its one log."""

import asyncio

import pytest
from tests.support.joblog_bench import MODEL, Bench, ready

from gradstream.shared.errors import QueueFull, SequenceConflict, UnknownModel
from gradstream.shared.ids import LANE_SEQS, MAX_LANE, UNLOAD_SEQ, ModelId, TenantId, lane_of, seq_in_lane
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import FutureStatus

LOCAL = TenantId("local")


def one(seq_id: int) -> int:
    return seq_in_lane(1, seq_id)


def two(seq_id: int) -> int:
    return seq_in_lane(2, seq_id)


async def test_each_lane_begins_at_one_and_the_log_has_them_in_the_order_of_arrival(bench: Bench) -> None:
    await bench.create()
    arrival = [1, two(1), one(1), two(2), 2, two(3), 3]
    for seq in arrival:
        assert (await bench.submit(seq, b"%d" % seq)).status is FutureStatus.QUEUED
    assert bench.seqs() == [0, *arrival]
    assert [entry.job.payload for entry in bench.log()[1:]] == [b"%d" % seq for seq in arrival]


async def test_a_job_ahead_of_its_turn_waits_for_its_own_lane_only(bench: Bench) -> None:
    await bench.create()
    assert (await bench.submit(one(2))).status is FutureStatus.HELD
    assert (await bench.view(one(2))).waiting_for_seq == one(1)
    for seq in (1, two(1), 2, two(2)):
        assert (await bench.submit(seq)).status is FutureStatus.QUEUED
    assert (await bench.view(one(2))).status is FutureStatus.HELD
    await bench.submit(one(1))
    assert bench.seqs() == [0, 1, two(1), 2, two(2), one(1), one(2)]


async def test_lanes_that_arrive_all_at_once_and_backwards_come_out_in_order(bench: Bench) -> None:
    await bench.create()
    seqs = [seq_in_lane(lane, seq_id) for lane in (0, 1, MAX_LANE) for seq_id in range(1, 41)]
    await asyncio.gather(*(bench.submit(seq, b"%d" % seq) for seq in reversed(seqs)))
    logged = bench.seqs()[1:]
    assert sorted(logged) == seqs
    for lane in (0, 1, MAX_LANE):
        assert [seq for seq in logged if lane_of(seq) == lane] == [seq for seq in seqs if lane_of(seq) == lane]


async def test_a_repeated_job_is_the_same_future_in_its_lane_and_another_one_elsewhere(bench: Bench) -> None:
    await bench.ready()
    first = await bench.submit(one(1), b"same")
    assert (await bench.submit(one(1), b"same")) == type(first)(
        future_id=first.future_id, status=FutureStatus.QUEUED, is_duplicate=True
    )
    assert not (await bench.submit(1, b"same")).is_duplicate
    assert not (await bench.submit(two(1), b"same")).is_duplicate
    assert bench.seqs() == [0, one(1), 1, two(1)]
    bench.commit(bench.log()[1:2])
    bench.raw.delete(bench.keys.future(first.future_id))
    again = await bench.submit(one(1), b"same")
    assert (again.status, again.is_duplicate) == (FutureStatus.DONE, True)
    with pytest.raises(SequenceConflict, match="seq_id 1 of lane 1 of s1:train:0 was used with another payload"):
        await bench.submit(one(1), b"other")


async def test_a_refused_request_uses_up_its_seq_in_its_lane_only(bench: Bench) -> None:
    await bench.create()
    await bench.submit(one(2))
    await bench.submit(two(2))
    await bench.intake.refuse(model=MODEL, seq=one(1), tenant=LOCAL)
    assert bench.seqs() == [0, one(2)]
    assert (await bench.view(two(2))).waiting_for_seq == two(1)
    with pytest.raises(SequenceConflict, match=r"seq_id 1 of lane 1 .* was refused"):
        await bench.submit(one(1))
    assert (await bench.submit(1)).status is FutureStatus.QUEUED


async def test_a_gap_fails_the_jobs_of_its_lane_and_no_others(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(hold_timeout_s=0.0)) as bench:
        await bench.create()
        await bench.submit(1)
        await bench.submit(one(3))
        await bench.submit(two(1))
        await bench.submit(two(4))
        assert await bench.intake.fail_gaps() == 2
        assert (await bench.failure(one(3))).message.startswith("job seq 3 of lane 1 was held")
        assert "because seq 1 of lane 1, 2 of lane 1 never came" in (await bench.failure(one(3))).message
        assert "because seq 2 of lane 2, 3 of lane 2 never came" in (await bench.failure(two(4))).message
        assert await bench.intake.fail_gaps() == 0
        for seq in (2, one(4), two(5)):
            assert (await bench.submit(seq)).status is FutureStatus.QUEUED
        with pytest.raises(SequenceConflict, match="came too late"):
            await bench.submit(two(2))
        assert bench.seqs() == [0, 1, two(1), 2, one(4), two(5)]
        assert (await bench.record())["held"] == "0"


async def test_a_young_gap_of_one_lane_outlives_the_old_gap_of_another(bench: Bench) -> None:
    await bench.create()
    await bench.submit(one(2))
    await bench.submit(two(2))
    # The clock of the server cannot be turned; the arrival in lane 1 is moved into the past instead.
    bench.raw.zadd(f"{bench.keys.prefix}held:{MODEL}", {str(one(2)): 1})
    bench.raw.zadd(f"{bench.keys.prefix}gaps", {MODEL: 1})
    assert await bench.intake.fail_gaps() == 1
    assert (await bench.view(one(2))).status is FutureStatus.FAILED
    assert (await bench.view(two(2))).status is FutureStatus.HELD
    assert float(bench.raw.zscore(f"{bench.keys.prefix}gaps", MODEL)) > 1
    await bench.submit(two(1))
    assert bench.seqs() == [0, two(1), two(2)]


async def test_positions_are_kept_by_lane(bench: Bench) -> None:
    await bench.ready()
    for seq in (1, one(1), one(2), 2):
        await bench.submit(seq)
    bench.commit(bench.log()[1:4])
    record = await bench.record()
    assert (record["next_seq"], record["applied"]) == ("3", "1")
    assert (record["next_seq:1"], record["applied:1"]) == (str(one(3)), str(one(2)))


async def test_the_window_counts_from_each_lanes_own_next_seq(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(hold_window=4)) as bench:
        await bench.create()
        for seq_id in range(1, 8):
            await bench.submit(seq_id)
        assert (await bench.submit(one(4))).status is FutureStatus.HELD
        with pytest.raises(QueueFull, match="4 ahead of the model's next one"):
            await bench.submit(one(5))


async def test_all_lanes_share_the_models_budget(joblog_url: str, engine_name: str) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(max_queued_jobs_per_model=4)) as bench:
        await bench.create()
        for lane in (0, 1, 2):
            await bench.submit(seq_in_lane(lane, 1))
        with pytest.raises(QueueFull, match="4 jobs are queued here"):
            await bench.submit(seq_in_lane(3, 1))


async def test_old_digests_of_a_lane_are_forgotten_without_touching_another_lane(
    joblog_url: str, engine_name: str
) -> None:
    async with Bench.running(joblog_url, engine_name, Limits(keep_seqs=2)) as bench:
        await bench.create()
        await bench.submit(1)
        for seq_id in range(1, 6):
            await bench.submit(one(seq_id))
        kept = {int(seq) for seq in bench.raw.hkeys(f"{bench.keys.prefix}seqs:{MODEL}")}
        assert kept == {0, 1, one(4), one(5)}


async def test_a_lane_of_another_tenants_model_is_unknown(bench: Bench) -> None:
    await bench.create()
    with pytest.raises(UnknownModel):
        await bench.submit(one(1), tenant=TenantId("other"))
    with pytest.raises(UnknownModel):
        await bench.intake.refuse(model=MODEL, seq=one(1), tenant=TenantId("other"))
    assert bench.seqs() == [0]


async def test_a_lane_needs_a_model_that_is_there(bench: Bench) -> None:
    with pytest.raises(UnknownModel):
        await bench.submit(one(1), model=ModelId("nobody:train:0"))


async def test_held_jobs_of_every_lane_fail_when_their_model_is_removed(bench: Bench) -> None:
    await bench.ready()
    await bench.submit(2)
    await bench.submit(one(2))
    removed = ready()
    bench.commit([], records=[type(removed)(kind=removed.kind, record_id=removed.record_id, fields=None)])
    assert (await bench.failure(2)).message == f"model {MODEL} was removed while job seq 2 was held for an earlier one"
    assert "job seq 2 of lane 1 was held" in (await bench.failure(one(2))).message


def test_lanes_do_not_touch_each_other_nor_the_seq_of_an_unload() -> None:
    assert UNLOAD_SEQ < LANE_SEQS
    assert lane_of(seq_in_lane(MAX_LANE, UNLOAD_SEQ)) == MAX_LANE
    # Lua counts in doubles.
    assert seq_in_lane(MAX_LANE, UNLOAD_SEQ) < 2**53 - 2**20
