"""GET /health tells how queue and worker really are."""

import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tests.support.api_server import api_server
from tests.support.redis_server import SHIPPED, running_server
from tests.support.rig import FAST, LIMITS, Rig, running_rig

from gradstream.shared.ids import LOCAL_TENANT, TenantId
from gradstream.shared.joblog.redis_feed import RedisFeed
from gradstream.shared.keys import change_keys, mint


def test_a_server_with_a_worker_is_healthy(rig: Rig) -> None:
    answer = rig.ok(rig.http.get("/health"))
    assert (answer["status"], answer["engine_running"], answer["detail"]) == ("healthy", True, None)
    assert answer["redis"] == {"reachable": True}
    assert answer["worker"]["num_ranks"] == 1
    assert answer["worker"]["epoch"] >= 1
    assert 0 <= answer["worker"]["heartbeat_age_s"] < 5


def test_the_prefix_that_forces_the_dialect_leads_there_too(rig: Rig) -> None:
    assert rig.ok(rig.http.get("/xorl/health"))["status"] == "healthy"


def test_jobs_that_wait_are_active_and_every_accepted_one_is_in_the_total(rig: Rig) -> None:
    model = rig.model()
    rig.worker.pause()
    futures = [rig.ok(rig.step(model, seq))["request_id"] for seq in (1, 2)]
    waiting = rig.ok(rig.http.get("/health"))
    rig.worker.resume()
    for future in futures:
        rig.result(future)
    done = rig.ok(rig.http.get("/health"))
    assert (waiting["active_requests"], waiting["total_requests"]) == (2, 3)
    assert waiting["queue"]["jobs"] == 2
    assert waiting["queue"]["bytes"] > 0
    assert (done["active_requests"], done["total_requests"]) == (0, 3)


def test_without_a_worker_it_says_so_with_503(redis_url: str, engine_name: str) -> None:
    with api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url:
        answer = httpx.get(f"{base_url}/health", timeout=60)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) >= 1
    told = answer.json()
    assert (told["status"], told["engine_running"], told["worker"]["heartbeat_age_s"]) == ("no_worker", False, None)
    assert "no worker is running" in told["detail"]


def test_a_gang_that_takes_over_is_starting(redis_url: str, engine_name: str) -> None:
    with (
        RedisFeed(redis_url, engine=engine_name) as feed,
        api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url,
    ):
        epoch = feed.acquire(owner="gang")
        answer = httpx.get(f"{base_url}/health", timeout=60)
        feed.release(epoch)
    assert answer.status_code == 503
    assert (answer.json()["status"], answer.json()["engine_running"]) == ("starting", False)


def test_a_queue_that_is_gone_is_an_error_within_seconds(engine_name: str) -> None:
    with running_server(SHIPPED) as server:
        url = server.url
    with api_server(url, engine=engine_name, config=FAST, limits=LIMITS) as base_url:
        began = time.monotonic()
        answer = httpx.get(f"{base_url}/health", timeout=90)
    assert answer.status_code == 503
    assert (answer.json()["status"], answer.json()["redis"]) == ("error", {"reachable": False})
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("tenant", "numbers"),
    [
        (None, set()),
        ("alice", {"active_requests"}),
        (LOCAL_TENANT, {"active_requests", "total_requests", "worker", "queue"}),
    ],
)
def test_with_keys_it_needs_none_and_tells_each_tenant_what_is_its_own(
    redis_url: str, engine_name: str, tmp_path: Path, tenant: str | None, numbers: set[str]
) -> None:
    path = tmp_path / "keys.json"
    made = mint(TenantId(tenant or "other"), created_ms=0)
    change_keys(path, lambda keys: (*keys, made.stored))
    headers = {} if tenant is None else {"Authorization": f"Bearer {made.text}"}
    with running_rig(redis_url, engine=engine_name, config=replace(FAST, keys_file=path)) as rig:
        answer = rig.ok(rig.http.get("/health", headers=headers))
    assert answer["status"] == "healthy"
    shown = {name for name in ("active_requests", "total_requests", "worker", "queue") if answer[name] is not None}
    assert shown == numbers
