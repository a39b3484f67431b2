"""API processes as the launcher starts them: from a settings file."""

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from gradstream.shared.config import load_settings, write_handover

DEADLINE_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def handover(tmp_path: Path, *, redis_url: str, engine: str, port: int, **fields: object) -> Path:
    """The settings file of an API on this port."""
    config = tmp_path / "server.yaml"
    named = {"model_path": tmp_path, "redis_url": redis_url, "engine_name": engine, "api_port": port, **fields}
    config.write_text("".join(f"{name}: {value}\n" for name, value in named.items()), encoding="utf-8")
    path = tmp_path / "handover.json"
    write_handover(load_settings(config), path)
    return path


@contextlib.contextmanager
def api_process(path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Killed at the end of the block."""
    command = [sys.executable, "-m", "gradstream.api", "--settings", str(path), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_it_answers(base_url: str, process: subprocess.Popen[str]) -> httpx.Response:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None
        try:
            return httpx.get(f"{base_url}/api/v1/healthz")
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the API did not answer")
