"""Payloads are told apart by their digests, also where an earlier version gave them."""

import pytest
from tests.support.joblog_bench import MODEL, Bench

from gradstream.shared.errors import SequenceConflict
from gradstream.shared.ids import future_id
from gradstream.shared.joblog.packed import former_digest, payload_digest

_LONG = bytes(range(256)) * 1000


def as_formerly_accepted(bench: Bench, seq: int, payload: bytes) -> None:
    """Redis as it is when an earlier version accepted this job."""
    digest = former_digest(payload)
    bench.raw.hset(bench.keys.future(future_id(MODEL, seq)), "digest", digest)
    bench.raw.hset(f"{bench.keys.prefix}seqs:{MODEL}", str(seq), digest)


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


async def test_a_gang_that_takes_over_knows_jobs_that_an_earlier_version_accepted(bench: Bench) -> None:
    await bench.create()
    await bench.submit(1, _LONG)
    as_formerly_accepted(bench, 1, _LONG)
    assert bench.feed.expel(bench.log(), epoch=bench.epoch) == set()
    bench.raw.hset(bench.keys.future(future_id(MODEL, 1)), "digest", former_digest(b"another"))
    assert bench.feed.expel(bench.log(), epoch=bench.epoch) == {future_id(MODEL, 1)}
