"""A Redis that was put back in time, and the seqs that it would give out once more."""

from dataclasses import replace

import msgspec
import pytest
from tests.support.cards import UNIFORM_CARD
from tests.support.joblog_bench import Bench

from gradstream.shared import codec
from gradstream.shared.errors import SequenceConflict, Unavailable, UnknownModel
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, future_id
from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.port import (
    BatchId,
    Commit,
    Ended,
    FutureStatus,
    LogEntry,
    Receipt,
    RecordKind,
    RecordWrite,
    Submission,
)
from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Failed, OptimStepDone

NAME = ModelId("default")
RECORD = {"base_model": "tiny", "session": NAME, "created_ms": "1"}


async def send(bench: Bench, op: str, payload: bytes | None = None, *, intake: RedisIntake | None = None) -> Receipt:
    return await (intake or bench.intake).submit(
        Submission(
            owner=NAME,
            seq=None,
            op=op,
            tenant=LOCAL_TENANT,
            payload=payload or op.encode(),
            model_record=RECORD if op == "create_model" else None,
        )
    )


def keys(bench: Bench) -> list[str]:
    return list(bench.raw.scan_iter(match=bench.keys.prefix.replace("{", "\\{") + "*", count=1000))


class Image:
    """What Redis held at a moment, as a replica has it."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._raw = type(bench.raw).from_url(bench.url)
        self._stored = {name: self._raw.dump(name) for name in keys(bench)}

    def put_back(self) -> None:
        """Everything as it was then, but for the lease, which is over."""
        for name in keys(self._bench):
            self._raw.delete(name)
        for name, stored in self._stored.items():
            if name != self._bench.keys.lease:
                self._raw.restore(name, 0, stored)
        self._raw.close()


def next_gang(bench: Bench) -> None:
    bench.epoch = bench.feed.acquire(owner="test-gang", above=bench.epoch)


def lead(bench: Bench) -> None:
    """The gang has taken over."""
    bench.feed.publish_card(msgspec.structs.replace(UNIFORM_CARD, epoch=bench.epoch), epoch=bench.epoch)


def make_up(bench: Bench, entries: list[LogEntry], *, number: int) -> None:
    """What a take-over does with a logged batch that Redis lacks."""
    gone = bench.feed.unknown([entry.job.future_id for entry in entries])
    for entry in entries:
        if entry.job.future_id in gone:
            bench.feed.restore(entry, epoch=bench.epoch)
    bench.feed.expel(entries, epoch=bench.epoch)
    bench.feed.commit(
        Commit(
            epoch=bench.epoch,
            number=0,
            batch=BatchId(1, number),
            outcomes=[Ended.of(entry.job, OptimStepDone(metrics={"loss": 0.5})) for entry in entries],
            plan=b"plan",
            cursor=entries[-1].entry_id,
            at_ms=2**40,
        )
    )


async def test_no_seq_is_given_out_while_the_queue_lacks_jobs_that_were_accepted(bench: Bench) -> None:
    await send(bench, "create_model")
    image = Image(bench)
    await send(bench, "optim_step", b"old")
    log = bench.log()
    image.put_back()
    with pytest.raises(Unavailable, match="the server is recovering"):
        await send(bench, "optim_step", b"new")
    next_gang(bench)
    with pytest.raises(Unavailable):
        await send(bench, "optim_step", b"new")
    bench.feed.restore(log[1], epoch=bench.epoch)
    lead(bench)
    assert (await send(bench, "optim_step", b"new")).future_id == "default:2"


async def test_what_nobody_read_before_it_was_lost_is_not_waited_for_once_a_gang_has_taken_over(bench: Bench) -> None:
    await send(bench, "create_model")
    image = Image(bench)
    for _ in range(3):
        await send(bench, "optim_step")
    image.put_back()
    next_gang(bench)
    lead(bench)
    assert [(await send(bench, "optim_step")).future_id for _ in range(2)] == ["default:1", "default:2"]


async def test_an_emptied_redis_takes_nothing_until_a_gang_has_taken_over(bench: Bench) -> None:
    await send(bench, "create_model")
    bench.raw.flushall()
    with pytest.raises(Unavailable):
        await send(bench, "create_model")
    next_gang(bench)
    lead(bench)
    assert (await send(bench, "create_model")).future_id == "default:0"


async def test_an_ordinary_change_of_gangs_refuses_nothing(bench: Bench) -> None:
    await send(bench, "create_model")
    bench.raw.delete(bench.keys.lease)
    assert (await send(bench, "optim_step")).future_id == "default:1"
    next_gang(bench)
    assert (await send(bench, "optim_step")).future_id == "default:2"


async def test_a_job_that_got_the_seq_of_an_executed_one_fails_and_says_so(bench: Bench) -> None:
    await send(bench, "create_model")
    image = Image(bench)
    await send(bench, "optim_step", b"old")
    old = [replace(entry, is_open=False) for entry in bench.log()]
    image.put_back()
    async with RedisIntake(bench.url, engine=bench.keys.engine, limits=Limits()) as fresh:
        assert (await send(bench, "optim_step", b"new", intake=fresh)).future_id == "default:1"
        next_gang(bench)
        make_up(bench, old, number=1)
        view = await fresh.future(future_id(NAME, 1))
        assert view is not None
        assert view.status is FutureStatus.FAILED
        outcome = codec.decode_outcome(view.outcome or b"")
        assert isinstance(outcome, Failed)
        assert "lost while the queue was recovering" in outcome.message
        assert "send it again" in outcome.message
        record = await bench.record(NAME)
        assert (record["applied"], record["queued"], record["next_seq"]) == ("1", "0", "2")
        assert [entry.job.seq for entry in bench.log() if entry.is_open] == []
        assert (await send(bench, "optim_step", b"new", intake=fresh)).future_id == "default:2"


async def test_an_open_job_whose_seq_was_given_out_again_is_named(bench: Bench) -> None:
    await send(bench, "create_model")
    image = Image(bench)
    await send(bench, "optim_step", b"old")
    log = bench.log()
    image.put_back()
    async with RedisIntake(bench.url, engine=bench.keys.engine, limits=Limits()) as fresh:
        await send(bench, "unload_model", intake=fresh)
        next_gang(bench)
        for _ in range(2):
            assert bench.feed.expel(log, epoch=bench.epoch) == {FutureId("default:1")}
        record = await bench.record(NAME)
        assert (record["queued"], record["applied"], record["tail"]) == ("1", "-1", "live")
        assert (await send(bench, "optim_step", b"new", intake=fresh)).future_id == "default:2"


async def test_a_model_whose_unload_failed_lives_on_and_can_be_unloaded_and_made_again(bench: Bench) -> None:
    for op in ("create_model", "unload_model"):
        await send(bench, op)
    created, unload = bench.log()
    ready = RecordWrite(kind=RecordKind.MODEL, record_id=NAME, fields={"state": "ready"})
    bench.commit([created], records=[ready])
    with pytest.raises(UnknownModel):
        await send(bench, "optim_step")
    bench.commit([unload], Failed(code="server_error", category="server", message="the worker died"))
    assert (await send(bench, "optim_step")).future_id == "default:2"
    with pytest.raises(SequenceConflict):
        await send(bench, "create_model", b"second")
    assert (await send(bench, "unload_model")).future_id == "default:3"
    assert (await send(bench, "create_model", b"second")).future_id == "default:4"
