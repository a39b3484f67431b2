"""What clients hear of missing things before a gang leads, while one takes over, and after it restored everything."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import msgspec
import pytest
from tests.support.api_server import api_server
from tests.support.cards import UNIFORM_CARD
from tests.support.rig import FAST, LIMITS, Rig

from gradstream.shared.joblog.limits import Limits
from gradstream.shared.joblog.redis_feed import RedisFeed

_DEADLINE_S = 60.0


class Gang:
    """The queue's side of a gang that takes over and leads."""

    def __init__(self, feed: RedisFeed) -> None:
        self._feed = feed
        self._epoch = 0

    def take_over(self) -> None:
        self._epoch = self._feed.acquire(owner="gang")

    def lead(self) -> None:
        self._feed.publish_card(msgspec.structs.replace(UNIFORM_CARD, epoch=self._epoch), epoch=self._epoch)

    def end(self) -> None:
        self._feed.release(self._epoch)


@pytest.fixture
def gang(redis_url: str, engine_name: str) -> Iterator[Gang]:
    # Nobody renews the lease.
    with RedisFeed(redis_url, engine=engine_name, limits=Limits(lease_ttl_s=3600.0)) as feed:
        yield Gang(feed)


@contextmanager
def api(url: str, engine: str, *, hold_s: float = FAST.poll_hold_s) -> Iterator[Rig]:
    config = replace(FAST, poll_hold_s=hold_s)
    with (
        api_server(url, engine=engine, config=config, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=90) as http,
    ):
        yield Rig(base_url, http, worker=None)  # type: ignore[arg-type]


def answers(rig: Rig) -> set[int]:
    """The statuses of calls about a model, a session and a checkpoint that are not there."""
    calls = (
        rig.train("s:train:0", 1),
        rig.step("s:train:0", 2),
        rig.post("session_heartbeat", {"session_id": "s"}),
        rig.http.get("/api/v1/training_runs/s:train:0"),
    )
    for call in calls:
        if call.status_code == 503:
            assert (call.json()["error"], int(call.headers["retry-after"]) > 0) == ("unavailable", True)
    return {call.status_code for call in calls}


def until_settled(rig: Rig) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while answers(rig) != {404}:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_missing_is_503_until_a_gang_leads_and_404_from_then_on(
    redis_url: str, engine_name: str, gang: Gang
) -> None:
    with api(redis_url, engine_name) as rig:
        assert answers(rig) == {503}
        gang.take_over()
        assert answers(rig) == {503}
        gang.lead()
        until_settled(rig)
        gang.take_over()
        assert answers(rig) == {503}
        gang.lead()
        until_settled(rig)
        gang.end()
        assert answers(rig) == {503}


def test_an_api_that_starts_beside_a_gang_says_404_at_once(redis_url: str, engine_name: str, gang: Gang) -> None:
    gang.take_over()
    gang.lead()
    with api(redis_url, engine_name) as rig:
        assert answers(rig) == {404}


def test_a_poll_of_a_missing_future_is_held_while_a_gang_takes_over(
    redis_url: str, engine_name: str, gang: Gang
) -> None:
    with api(redis_url, engine_name) as rig:
        gang.take_over()
        start_s = time.monotonic()
        answer = rig.poll("s:train:0:1")
        assert time.monotonic() - start_s >= FAST.poll_hold_s
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert "recovering" in answer.json()["queue_state_reason"]


def test_a_held_poll_ends_when_the_gang_leads(redis_url: str, engine_name: str, gang: Gang) -> None:
    with api(redis_url, engine_name, hold_s=_DEADLINE_S) as rig, ThreadPoolExecutor(1) as threads:
        gang.take_over()
        poll = threads.submit(rig.poll, "s:train:0:1")
        gang.lead()
        assert poll.result(_DEADLINE_S).status_code == 404


def test_a_request_that_is_wrong_in_itself_is_400_all_the_same(redis_url: str, engine_name: str) -> None:
    with api(redis_url, engine_name) as rig:
        assert rig.post("session_heartbeat", {"session": 1}).status_code == 400


def test_a_xorl_model_is_not_made_anew_while_it_may_be_restored(redis_url: str, engine_name: str, gang: Gang) -> None:
    with api(redis_url, engine_name, hold_s=0.1) as rig:
        gang.take_over()
        gang.lead()
        until_settled(rig)
        gang.end()
        gang.take_over()
        for call, body in (("optim_step", {}), ("create_model", {"model_id": "mine", "lora_config": {"rank": 4}})):
            answer = rig.post(call, body)
            assert answer.status_code == 503, answer.text
            assert int(answer.headers["retry-after"]) > 0
        assert rig.post("unload_model", {"model_id": "mine"}).status_code == 503
        poll = rig.ok(rig.post("retrieve_future", {"request_id": "default:0"}))
        assert (poll["type"], poll["queue_state"]) == ("try_again", "paused_capacity")


def test_a_xorl_model_is_made_at_once_when_a_gang_leads(redis_url: str, engine_name: str, gang: Gang) -> None:
    gang.take_over()
    with api(redis_url, engine_name, hold_s=0.1) as rig:
        gang.lead()
        assert rig.ok(rig.post("optim_step", {"model_id": "default"}))["request_id"] == "default:1"
