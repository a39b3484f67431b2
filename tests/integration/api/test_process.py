"""The API as the launcher starts it: a process of its own, from a settings file."""

import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from tests.support.api_process import DEADLINE_S, api_process, free_port, handover, wait_until, wait_until_it_answers
from tests.support.rig import running_rig


def test_the_process_serves_and_ends_with_0_on_sigterm_after_it_answered_the_parked_polls(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with running_rig(redis_url, engine=engine_name) as rig:
        model = rig.model()
        rig.worker.pause()
        future = rig.ok(rig.train(model, 1))["request_id"]
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    with (
        api_process(handover(tmp_path, redis_url=redis_url, engine=engine_name, port=port)) as process,
        ThreadPoolExecutor() as threads,
    ):
        assert wait_until_it_answers(base_url, process).json() == {"status": "starting"}
        poll = threads.submit(httpx.post, f"{base_url}/api/v1/retrieve_future", json={"request_id": future}, timeout=60)
        wait_until(lambda: "gradstream_api_polls_parked 1.0" in httpx.get(f"{base_url}/metrics").text)
        process.send_signal(signal.SIGTERM)
        assert poll.result(timeout=DEADLINE_S).status_code == 408
        _, log = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, log
        assert '"api_listening"' in log
        assert "Traceback" not in log


def test_a_port_that_is_taken_ends_the_process_with_78_and_one_sentence(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with api_process(handover(tmp_path, redis_url=redis_url, engine=engine_name, port=port)) as process:
            _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 78
    assert f"api_port {port}: cannot listen there" in log


def test_a_settings_file_that_is_broken_ends_the_process_with_78(tmp_path: Path) -> None:
    path = tmp_path / "handover.json"
    path.write_text("{}", encoding="utf-8")
    with api_process(path) as process:
        _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 78
    assert "Traceback" not in log


def test_another_address_is_given_on_the_command_line_and_is_checked_as_the_settings_are(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    path, port = handover(tmp_path, redis_url=redis_url, engine=engine_name, port=5555), free_port()
    with api_process(path, "--port", str(port)) as process:
        wait_until_it_answers(f"http://127.0.0.1:{port}", process)
    with api_process(path, "--host", "192.0.2.1", "--port", str(port)) as process:
        _, log = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 78
    assert "there are no API keys" in log
