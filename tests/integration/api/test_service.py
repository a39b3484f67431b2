"""Configuration, capabilities, health, telemetry, metrics; and what is answered before a worker was ready."""

import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from tests.support.api_server import api_server
from tests.support.rig import FAST, LIMITS, Rig

from gradstream.api.serve import Address, listening_socket


def test_without_a_worker_model_calls_are_503_with_retry_after_and_sessions_work(
    redis_url: str, engine_name: str
) -> None:
    with (
        api_server(redis_url, engine=engine_name, config=FAST, limits=LIMITS) as base_url,
        httpx.Client(base_url=f"{base_url}/api/v1/", timeout=60) as http,
    ):
        made = http.post("create_session", json={"tags": [], "user_metadata": None, "sdk_version": "0.38.0"})
        body = {
            "session_id": made.json()["session_id"],
            "model_seq_id": 0,
            "base_model": "x",
            "lora_config": {"rank": 8},
        }
        for response in (http.post("create_model", json=body), http.get("get_server_capabilities")):
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"] == "unavailable"
            assert "no worker has been ready yet" in response.json()["detail"]
        assert http.get("healthz").json() == {"status": "starting"}


def test_with_a_worker_health_is_ok(rig: Rig) -> None:
    assert rig.ok(rig.http.get("/api/v1/healthz")) == {"status": "ok"}


def test_the_client_config_turns_compression_on_and_bounds_chunks(rig: Rig) -> None:
    config = rig.ok(rig.post("client/config", {"sdk_version": "0.38.0"}))
    assert config["proto_compress_fwdbwd"] is True
    assert config["pjwt_auth_enabled"] is False
    assert config["fwdbwd_max_chunk_len"] == FAST.max_datums
    assert rig.ok(rig.post("client/dynamic_config", {"sdk_version": "0.38.0"}))["refresh_interval_sec"] >= 10


@pytest.mark.parametrize(
    ("python", "uses_pyqwest"),
    [("3.11.7", False), ("3.10.14", False), ("3.12.0", True), ("3.14.0rc1", True), ("unknown", True), ("", True)],
)
def test_clients_whose_python_loses_cancellations_get_the_plain_transport(
    rig: Rig, python: str, uses_pyqwest: bool
) -> None:
    answer = rig.http.post("/api/v1/client/config", json={}, headers={"X-Stainless-Runtime-Version": python})
    assert rig.ok(answer)["use_pyqwest_transport"] is uses_pyqwest


def test_telemetry_is_counted_and_dropped(rig: Rig) -> None:
    body = {"events": [{"event": "A"}, {"event": "B"}], "platform": "x", "sdk_version": "y", "session_id": "z"}
    assert rig.ok(rig.post("telemetry", body)) == {"status": "accepted"}
    metrics = rig.http.get("/metrics").text
    assert "gradstream_api_telemetry_events_total 2.0" in metrics
    assert 'route="/api/v1/telemetry"' in metrics
    assert rig.post("telemetry", {"events": 1}).status_code == 400


def test_the_openapi_document_loads_and_lists_every_call(rig: Rig) -> None:
    document = rig.ok(rig.http.get("/openapi.json"))
    assert document["openapi"].startswith("3.")
    calls = {path.removeprefix("/api/v1/") for path in document["paths"]}
    assert {"forward_backward", "retrieve_future", "asample", "create_model", "optim_step", "load_weights"} <= calls
    fields = document["paths"]["/api/v1/create_model"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(fields["required"]) == {"session_id", "model_seq_id", "base_model"}


def test_importing_the_app_leaves_torch_out() -> None:
    code = "import sys, gradstream.api.app, gradstream.api.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_do_not_wait_for_the_clients_acknowledgements() -> None:
    with listening_socket(Address(host="127.0.0.1", port=0)) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_the_protobuf_modules_are_what_their_proto_file_gives() -> None:
    script = Path(__file__).parents[3] / "tools" / "generate_proto.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0
