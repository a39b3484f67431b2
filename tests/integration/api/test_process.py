"""The API as the launcher starts it: a process of its own, from a settings file."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from tests.support.rig import running_rig

from gradstream.shared.config import load_settings, write_handover

_DEADLINE_S = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def handover(tmp_path: Path, *, redis_url: str, engine: str, port: int) -> Path:
    """The settings file of an API on this port."""
    config = tmp_path / "server.yaml"
    config.write_text(
        f"model_path: {tmp_path}\nredis_url: {redis_url}\nengine_name: {engine}\napi_port: {port}\n", encoding="utf-8"
    )
    path = tmp_path / "handover.json"
    write_handover(load_settings(config), path)
    return path


@contextlib.contextmanager
def api_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "gradstream.api", "--settings", str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_it_answers(base_url: str, process: subprocess.Popen[str]) -> httpx.Response:
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            return httpx.get(f"{base_url}/api/v1/healthz")
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the API did not answer")


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
        assert poll.result(timeout=_DEADLINE_S).status_code == 408
        _, log = process.communicate(timeout=_DEADLINE_S)
        assert process.returncode == 0, log
        assert '"api_listening"' in log
        assert "Traceback" not in log


def test_a_port_that_is_taken_ends_the_process_with_78_and_one_sentence(
    tmp_path: Path, redis_url: str, engine_name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with api_process(handover(tmp_path, redis_url=redis_url, engine=engine_name, port=port)) as process:
            _, log = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 78
    assert f"api_port {port}: cannot listen there" in log


def test_a_settings_file_that_is_broken_ends_the_process_with_78(tmp_path: Path) -> None:
    path = tmp_path / "handover.json"
    path.write_text("{}", encoding="utf-8")
    with api_process(path) as process:
        _, log = process.communicate(timeout=_DEADLINE_S)
    assert process.returncode == 78
    assert "Traceback" not in log
