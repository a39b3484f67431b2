"""Inference servers are registered after they answered, stay known to every API process, and are never called for a stranger."""

import gzip
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from tests.support.api_server import api_server
from tests.support.inference_server import Inference, inference_server
from tests.support.rig import FAST, LIMITS, Rig, running_rig

from examples.local_server import free_port
from gradstream.shared.ids import TenantId
from gradstream.shared.keys import change_keys, mint


@pytest.fixture
def inference() -> Iterator[Inference]:
    with inference_server() as server:
        yield server


def add(rig: Rig, port: int, *, host: str = "127.0.0.1", **fields: object) -> dict:
    return rig.ok(rig.http.post("/add_inference_endpoint", json={"host": host, "port": port, **fields}))


def listed(http: httpx.Client) -> list[dict]:
    answer = http.get("/list_inference_endpoints").json()
    assert answer["count"] == len(answer["endpoints"])
    return answer["endpoints"]


def test_a_server_that_answers_is_registered_with_what_it_tells_of_itself(rig: Rig, inference: Inference) -> None:
    told = {
        "model_path": "m",
        "tp_size": 2,
        "enable_lora": True,
        "version": ["odd"],
        "secret": "x",
        "max_lora_rank": True,
    }
    inference.says("/server_info", told)
    added = add(rig, inference.port, world_size=2, worker_port=7)
    info = added["endpoint"]["server_info"]
    assert added["success"]
    assert info == {
        "model_path": "m",
        "served_model_name": None,
        "tp_size": 2,
        "enable_lora": True,
        "max_lora_rank": None,
        "version": None,
    }
    [endpoint] = listed(rig.http)
    assert endpoint == added["endpoint"]
    assert (endpoint["healthy"], endpoint["world_size"], endpoint["worker_port"]) == (True, 2, 7)


def test_a_server_without_a_health_path_may_answer_with_its_models(rig: Rig, inference: Inference) -> None:
    inference.answers = {"/v1/models": (200, b"{}")}
    assert add(rig, inference.port)["success"]


def test_one_that_does_not_answer_is_not_registered_and_the_reason_is_told(rig: Rig, inference: Inference) -> None:
    inference.answers = {"/health": (503, b"")}
    refused = add(rig, inference.port)
    assert not refused["success"]
    assert "GET /health was answered with status 503; GET /v1/models was answered with status 404" in refused["message"]
    nobody = add(rig, free_port())
    assert not nobody["success"]
    assert "ConnectError" in nobody["message"]
    assert listed(rig.http) == []


def test_one_that_falls_ill_stays_registered_and_is_listed_as_unwell(rig: Rig, inference: Inference) -> None:
    add(rig, inference.port)
    inference.answers = {}
    [endpoint] = listed(rig.http)
    assert endpoint["healthy"] is False
    assert "404" in endpoint["detail"]


def test_registering_again_changes_the_settings_and_adds_nothing(rig: Rig, inference: Inference) -> None:
    add(rig, inference.port)
    add(rig, inference.port, world_size=8, pool="rl")
    [endpoint] = listed(rig.http)
    assert (endpoint["world_size"], endpoint["pool"]) == (8, "rl")


def test_another_api_process_knows_what_was_registered(
    rig: Rig, inference: Inference, redis_url: str, engine_name: str
) -> None:
    add(rig, inference.port)
    with (
        api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as http,
    ):
        assert [endpoint["port"] for endpoint in listed(http)] == [inference.port]


def test_one_is_forgotten_once_and_the_second_time_says_so(rig: Rig, inference: Inference) -> None:
    add(rig, inference.port)
    body = {"host": "127.0.0.1", "port": inference.port}
    answers = [rig.ok(rig.http.post("/remove_inference_endpoint", json=body)) for _ in range(2)]
    assert [answer["success"] for answer in answers] == [True, False]
    assert listed(rig.http) == []


def test_a_redirect_is_not_followed(rig: Rig, inference: Inference) -> None:
    inference.answers = {"/health": (302, b""), "/v1/models": (302, b""), "/elsewhere": (200, b"")}
    inference.headers = {"Location": "/elsewhere"}
    assert not add(rig, inference.port)["success"]
    assert "/elsewhere" not in [path for _, path, _ in inference.asked]


def test_an_endless_answer_is_cut_off(rig: Rig, inference: Inference) -> None:
    inference.answers = {"/health": (200, b" " * 1_000_000), "/v1/models": (200, b" " * 1_000_000)}
    answer = add(rig, inference.port)
    assert not answer["success"]
    assert "more than 262144 bytes" in answer["message"]


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "fe80::1", "::", "224.0.0.1", "fd00:ec2::254", "::ffff:169.254.1.1"]
)
def test_addresses_of_no_inference_server_are_not_called(rig: Rig, host: str) -> None:
    answer = add(rig, 80, host=host)
    assert not answer["success"]
    assert "an address that this server does not call" in answer["message"]


@pytest.mark.parametrize(
    "host",
    [
        "http://a",
        "a/b",
        "a b",
        "",
        "a:80",
        "-a",
        "user@a",
        "a" * 300,
        "fe80::1%eth0",
        "::1%1",
        "ex\u00e4mple",
        "\u212a.example",
    ],
)
def test_what_is_no_host_is_refused_by_name(rig: Rig, host: str) -> None:
    refused = rig.http.post("/add_inference_endpoint", json={"host": host, "port": 80})
    assert refused.status_code == 400
    assert refused.json()["detail"].startswith("host: ")


def test_a_packed_answer_is_counted_as_sent_and_not_unpacked(rig: Rig, inference: Inference) -> None:
    add(rig, inference.port)
    inference.answers["/server_info"] = (200, gzip.compress(b" " * 10**8))
    inference.headers = {"Content-Encoding": "gzip"}
    (endpoint,) = listed(rig.http)
    assert (endpoint["healthy"], endpoint["server_info"]) == (True, None)
    assert {encoding for encoding in inference.encodings if encoding} == {"identity"}


def test_many_endpoints_are_asked_a_few_at_a_time(rig: Rig) -> None:
    with inference_server() as slow:
        for number in range(40):
            add(rig, slow.port, host=f"127.0.0.{number + 1}")
        slow.delay_s, slow.least_at_once = 0.02, 2
        assert len(listed(rig.http)) == 40
        assert 1 < slow.most_at_once <= 8


def test_a_name_is_asked_for_under_that_name(rig: Rig, inference: Inference) -> None:
    assert add(rig, inference.port, host="LOCALHOST")["endpoint"]["host"] == "localhost"
    assert {host for _, _, host in inference.asked} == {f"localhost:{inference.port}"}


def test_weights_cannot_be_pushed_yet_and_every_way_to_ask_for_it_says_so(rig: Rig, inference: Inference) -> None:
    for path, body in {
        "/sync_inference_weights": {},
        "/api/v1/sync_inference_weights": {"master_port": 1},
        "/api/v1/create_sampling_session": {"model_path": "xorl://default/sampler_weights/x"},
    }.items():
        refused = rig.http.post(path, json=body)
        assert refused.status_code == 400
        assert "is not offered yet" in refused.json()["detail"]
    added = add(rig, inference.port, sync_weights=True)
    assert added["weights_synced"] is False
    assert "is not offered yet" in added["sync_message"]


def test_only_the_machines_own_tenant_may_name_machines(
    redis_url: str, engine_name: str, tmp_path: Path, inference: Inference
) -> None:
    made = mint(TenantId("alice"), created_ms=0)
    change_keys(tmp_path / "keys.json", lambda keys: (*keys, made.stored))
    config = replace(FAST, keys_file=tmp_path / "keys.json")
    with running_rig(redis_url, engine=engine_name, config=config) as rig:
        key = {"X-API-Key": made.text}
        body = {"host": "127.0.0.1", "port": inference.port}
        answers = [
            rig.http.post("/add_inference_endpoint", json=body, headers=key),
            rig.http.post("/remove_inference_endpoint", json=body, headers=key),
            rig.http.get("/list_inference_endpoints", headers=key),
        ]
    assert {answer.status_code for answer in answers} == {403}
    assert inference.asked == []
