"""Payloads are told apart by their digests, also where an earlier version gave them."""

import random
from dataclasses import replace

import pytest
from tests.support.joblog_bench import MODEL, Bench

from gradstream.shared.errors import SequenceConflict
from gradstream.shared.ids import DEFAULT_MODEL, LOCAL_TENANT, ModelId, future_id
from gradstream.shared.joblog.packed import Packed, former_digest, payload_digest
from gradstream.shared.joblog.port import Submission

# Too long to lie in the stream, also when it is compressed.
_LONG = random.Random(0).randbytes(200_000)
_NUMBERED = ModelId(DEFAULT_MODEL)


def as_formerly_accepted(bench: Bench, seq: int, payload: bytes) -> None:
    """Redis as it is when an earlier version accepted this job."""
    digest = former_digest(payload)
    bench.raw.hset(bench.keys.future(future_id(MODEL, seq)), "digest", digest)
    bench.raw.hset(f"{bench.keys.prefix}seqs:{MODEL}", str(seq), digest)


def numbered(op: str, payload: bytes, *, retry_key: str = "", packed: Packed | None = None) -> Submission:
    """A job that the server numbers, as a client sends it that names its requests."""
    return Submission(
        owner=_NUMBERED,
        seq=None,
        op=op,
        tenant=LOCAL_TENANT,
        payload=payload,
        retry_key=retry_key,
        packed=packed,
        model_record={"dialect": "xorl", "tenant": LOCAL_TENANT} if op == "create_model" else None,
    )


def num_blobs(bench: Bench) -> int:
    return sum(1 for _ in bench.raw.scan_iter(f"{bench.keys.prefix}blob:*"))


@pytest.mark.parametrize(
    ("payload", "digest"),
    [
        (b"", "cae66941d9efbd404e4d88758ea67670"),
        (bytes(64 * 1024), former_digest(bytes(64 * 1024))),
        (bytes(64 * 1024 + 1), "01779fe4dd4c044195009648d5b24ba3"),
    ],
)
def test_a_payload_has_the_digest_that_it_will_always_have(payload: bytes, digest: str) -> None:
    assert payload_digest(payload) == digest


@pytest.mark.parametrize("payload", [b"short", _LONG], ids=["short", "long"])
async def test_a_retry_of_what_an_earlier_version_accepted_is_the_same_job(bench: Bench, payload: bytes) -> None:
    await bench.create()
    first = await bench.submit(1, payload)
    as_formerly_accepted(bench, 1, payload)
    again = await bench.submit(1, payload)
    assert (again.future_id, again.is_duplicate) == (first.future_id, True)
    assert bench.log()[-1].job.payload == payload
    bench.raw.delete(bench.keys.future(first.future_id))
    assert (await bench.submit(1, payload)).is_duplicate
    assert bench.seqs() == [0, 1]


async def test_another_long_payload_is_a_conflict_whichever_version_accepted_the_first(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1, _LONG)
    for _ in range(2):
        with pytest.raises(SequenceConflict, match="was used with another payload"):
            await bench.submit(1, _LONG[::-1])
        as_formerly_accepted(bench, 1, _LONG)
    assert bench.seqs() == [0, 1]
    # That of the job, and one that expires.
    assert num_blobs(bench) == 2


async def test_a_gang_that_takes_over_knows_jobs_that_an_earlier_version_accepted(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1, _LONG)
    as_formerly_accepted(bench, 1, _LONG)
    log = bench.log()
    assert bench.feed.expel(log, epoch=bench.epoch) == set()
    for entry in log:
        bench.feed.restore(entry, epoch=bench.epoch)
    assert (await bench.submit(1, _LONG)).is_duplicate
    bench.raw.hset(bench.keys.future(future_id(MODEL, 1)), "digest", former_digest(b"another"))
    assert bench.feed.expel(log, epoch=bench.epoch) == {future_id(MODEL, 1)}


@pytest.mark.parametrize("is_redis_lost", [False, True], ids=["Redis stays", "Redis is lost"])
async def test_a_repeated_request_is_known_where_the_server_numbers_the_jobs(bench: Bench, is_redis_lost: bool) -> None:
    await bench.intake.submit(numbered("create_model", b"create"))
    formerly = replace(Packed.of(_LONG), digest=former_digest(_LONG))
    first = await bench.intake.submit(numbered("forward_backward", _LONG, retry_key="7", packed=formerly))
    if is_redis_lost:
        log = bench.log()
        bench.raw.flushdb()
        bench.epoch = bench.feed.acquire(owner="test-gang")
        for entry in log:
            bench.feed.restore(entry, epoch=bench.epoch)
    again = await bench.intake.submit(numbered("forward_backward", _LONG, retry_key="7"))
    assert again.future_id == first.future_id
    assert bench.seqs(_NUMBERED) == [0, 1]
