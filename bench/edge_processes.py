"""What bench.edge measures, as processes: queue, API, worker without an engine, the raw rival, and the clients."""

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.edge_worker import MODEL_NAME
from examples.local_server import free_port
from gradstream.shared.config import load_settings, write_handover
from gradstream.shared.embedded.config import Durability, EmbeddedConfig
from gradstream.shared.embedded.server import EmbeddedServer

ROOT = Path(__file__).parent.parent
_START_S = 60.0
_STOP_S = 20.0
_QUEUE_MEMORY_BYTES = 3 * 1024**3


class Child:
    """A process of the bench that speaks in JSON lines, with what it has used so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.pid = process.pid

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    # Any: each command has an answer of its own.
    def hear(self) -> dict[str, Any]:
        """The next line; raises RuntimeError when the process has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a process of the bench ended with {self._process.wait()}; its words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def finish(self) -> dict[str, Any]:
        """Close its stdin and take what it says last."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self.hear()

    def cpu_s(self) -> float:
        """CPU of all its threads that live, by the scheduler's own clock."""
        tasks = Path(f"/proc/{self.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    def resident_bytes(self) -> int:
        """Memory that is its own."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("this kernel says no Pss")


@contextmanager
def child(module: str, *arguments: str) -> Iterator[Child]:
    """A module of the bench or of gradstream, killed at the end of the block if it is still there."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Child(process)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """Everything that runs. port: of the API; raw_port: of the rival."""

    api: Child
    port: int
    raw: Child
    raw_port: int
    worker: Child

    def ask(self, path: str, fields: dict[str, object]) -> dict[str, Any]:
        """The API's answer to a small body; raises urllib's HTTPError."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/v1/{path}",
            data=json.dumps(fields).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  an address of this machine, made here
            answer: dict[str, Any] = json.load(response)
            return answer

    def session(self) -> str:
        return str(self.ask("create_session", {"tags": []})["session_id"])

    def models(self, count: int) -> list[str]:
        """That many models, ready, of a session of their own."""
        session = self.session()
        promises = [
            self.ask(
                "create_model",
                {"session_id": session, "model_seq_id": n, "base_model": MODEL_NAME, "lora_config": {"rank": 8}},
            )
            for n in range(count)
        ]
        for promise in promises:
            self.ask("retrieve_future", {"request_id": promise["request_id"]})
        return [str(promise["model_id"]) for promise in promises]

    def tell_worker(self, command: str) -> dict[str, Any]:
        """hold, release or answer; the worker's word when it has done so."""
        self.worker.say(command)
        return self.worker.hear()


@contextmanager
def edge(folder: Path, *, durability: Durability = "always") -> Iterator[Edge]:
    """A fresh queue with API and worker, and the raw rival."""
    with ExitStack() as stack:
        queue = stack.enter_context(
            EmbeddedServer(
                EmbeddedConfig(data_dir=folder / "queue", durability=durability, max_memory_bytes=_QUEUE_MEMORY_BYTES)
            )
        )
        port, raw_port = free_port(), free_port()
        worker = stack.enter_context(child("bench.edge_worker", "--redis", queue.url))
        worker.hear()
        api = stack.enter_context(child("gradstream.api", "--settings", str(_handover(folder, queue.url, port))))
        raw = stack.enter_context(child("bench.edge_raw", "--port", str(raw_port)))
        for number in (port, raw_port):
            _wait_for(number)
        yield Edge(api=api, port=port, raw=raw, raw_port=raw_port, worker=worker)


def _handover(folder: Path, redis_url: str, port: int) -> Path:
    config, path = folder / "server.yaml", folder / "settings.json"
    lines = [
        f"model_path: {folder}",
        f"output_dir: {folder / 'outputs'}",
        f"redis_url: {redis_url}",
        f"api_port: {port}",
        "log_level: WARNING",
    ]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_handover(load_settings(config), path)
    return path


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=20).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise TimeoutError(f"nothing answers on port {port} after {_START_S} s")
