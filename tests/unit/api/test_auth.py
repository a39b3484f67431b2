"""What of a request is its key, which requests a browser made for a stranger, and how many failures are answered."""

import pytest
from starlette.datastructures import Headers

from gradstream.api.auth import credential, is_from_foreign_page
from gradstream.api.failures import FailureLimit
from gradstream.shared.clock import ManualClock


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"X-API-Key": "tml-a"}, "tml-a"),
        ({"Authorization": "Bearer tml-a"}, "tml-a"),
        ({"authorization": "bearer  tml-a "}, "tml-a"),
        ({"X-API-Key": "tml-a", "Authorization": "Bearer tml-b"}, "tml-a"),
        ({"Authorization": "Basic dG1sOmE="}, None),
        ({"Authorization": "Bearer"}, None),
        ({"Authorization": "Bearer "}, None),
        ({"X-API-Key": ""}, None),
        ({"X-API-Key": "k" * 513}, None),
        ({}, None),
    ],
)
def test_the_key_is_taken_from_either_header(headers: dict, expected: str | None) -> None:
    assert credential({"headers": Headers(headers).raw}) == expected


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, False),
        ({"host": "127.0.0.1:5555"}, False),
        ({"host": "localhost:5555"}, False),
        ({"host": "[::1]:5555", "origin": "http://localhost:3000"}, False),
        ({"host": "evil.example:5555"}, True),
        ({"host": "127.0.0.1.evil.example"}, True),
        ({"host": "127.0.0.1:5555", "origin": "https://evil.example"}, True),
        ({"host": "127.0.0.1:5555", "origin": "null"}, True),
        ({"host": "127.0.0.1:5555", "origin": "http://[bad"}, True),
        ({"host": "localhost@evil.example"}, True),
    ],
)
def test_a_foreign_page_gives_itself_away_by_origin_or_host(headers: dict, expected: bool) -> None:
    assert is_from_foreign_page({"headers": Headers(headers).raw}) == expected


def test_failures_are_answered_up_to_a_burst_and_then_at_a_rate() -> None:
    clock = ManualClock()
    limit = FailureLimit(clock=clock, burst=3, refill_s=2.0)
    assert [limit.is_over("10.0.0.1") for _ in range(5)] == [False, False, False, True, True]
    assert not limit.is_over("10.0.0.2")
    clock.advance(2.0)
    assert [limit.is_over("10.0.0.1") for _ in range(2)] == [False, True]
    clock.advance(1000.0)
    assert [limit.is_over("10.0.0.1") for _ in range(4)] == [False, False, False, True]


def test_the_addresses_of_one_ipv6_host_share_a_bucket() -> None:
    limit = FailureLimit(clock=ManualClock(), burst=1)
    assert [limit.is_over(address) for address in ("fd00::1", "fd00::2", "fd00:0:0:1::1")] == [False, True, False]


def test_only_so_many_addresses_are_remembered() -> None:
    limit = FailureLimit(clock=ManualClock(), burst=1, max_addresses=2)
    for number in range(100):
        assert not limit.is_over(f"10.0.0.{number}")
    assert limit.is_over("10.0.0.99")
    assert not limit.is_over("10.0.0.1")
