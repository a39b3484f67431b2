"""The API as the launcher starts it: a process of its own, from a settings file."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from tests.support.api_process import ANY_PORT, DEADLINE_S, api_process, handover
from tests.support.polling import wait_until
from tests.support.rig import running_rig


def test_the_process_serves_and_ends_with_0_on_sigterm_after_it_answered_the_parked_polls(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with running_rig(redis_url, engine=engine_name) as rig:
        model = rig.model()
        rig.worker.pause()
        future = rig.ok(rig.train(model, 1))["request_id"]
    with (
        api_process(handover(tmp_path, redis_url=redis_url, engine=engine_name), *ANY_PORT) as api,
        ThreadPoolExecutor() as threads,
    ):
        base_url = api.base_url()
        assert httpx.get(f"{base_url}/api/v1/healthz", timeout=DEADLINE_S).json() == {"status": "starting"}
        poll = threads.submit(httpx.post, f"{base_url}/api/v1/retrieve_future", json={"request_id": future}, timeout=60)
        wait_until(
            lambda: "gradstream_api_polls_parked 1.0" in httpx.get(f"{base_url}/metrics", timeout=DEADLINE_S).text
        )
        api.process.send_signal(signal.SIGTERM)
        assert poll.result(timeout=DEADLINE_S).status_code == 408
        assert api.exit_status() == 0, api.log
        assert "Traceback" not in api.log


def test_a_port_that_is_taken_ends_the_process_with_78_and_one_sentence(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with api_process(handover(tmp_path, redis_url=redis_url, engine=engine_name, api_port=port)) as api:
            assert api.exit_status() == 78
    assert f"api_port {port}: cannot listen there" in api.log


def test_a_settings_file_that_is_broken_ends_the_process_with_78(tmp_path: Path) -> None:
    path = tmp_path / "handover.json"
    path.write_text("{}", encoding="utf-8")
    with api_process(path) as api:
        assert api.exit_status() == 78
    assert "Traceback" not in api.log


def test_another_address_is_given_on_the_command_line_and_is_checked_as_the_settings_are(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = handover(tmp_path, redis_url=redis_url, engine=engine_name, api_port=taken.getsockname()[1])
        with api_process(path, *ANY_PORT) as api:
            api.base_url()
    with api_process(path, "--host", "192.0.2.1", *ANY_PORT) as api:
        assert api.exit_status() == 78
    assert "there are no API keys" in api.log
