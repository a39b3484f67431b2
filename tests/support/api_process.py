"""API processes as the launcher starts them: from a settings file."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from gradstream.shared.config import load_settings, write_handover

DEADLINE_S = 120.0
# The arguments of a process that takes a free port of its own.
ANY_PORT = ("--port", "0")


def handover(tmp_path: Path, *, redis_url: str, engine: str, **fields: object) -> Path:
    """The settings file of an API."""
    config = tmp_path / "server.yaml"
    named = {"model_path": tmp_path, "redis_url": redis_url, "engine_name": engine, **fields}
    config.write_text("".join(f"{name}: {value}\n" for name, value in named.items()), encoding="utf-8")
    path = tmp_path / "handover.json"
    write_handover(load_settings(config), path)
    return path


@dataclass(frozen=True, slots=True)
class ApiProcess:
    """A process, and the file that has what it writes to stderr."""

    process: "subprocess.Popen[bytes]"
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def base_url(self) -> str:
        """Where it listens, as its log says, once it answers there."""
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            if (port := self._port()) is not None:
                base_url = f"http://127.0.0.1:{port}"
                with contextlib.suppress(httpx.TransportError):
                    httpx.get(f"{base_url}/api/v1/healthz")
                    return base_url
            time.sleep(0.05)
        raise AssertionError(f"the API did not answer\n{self.log}")

    def exit_status(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(timeout=DEADLINE_S)

    def _port(self) -> int | None:
        """The port of the log's line about it, None before there is one."""
        whole_lines = self.log.split("\n")[:-1]
        found = [json.loads(line) for line in whole_lines if '"api_listening"' in line]
        return found[0]["port"] if found else None


@contextlib.contextmanager
def api_process(path: Path, *arguments: str) -> Iterator[ApiProcess]:
    """Killed at the end of the block."""
    command = [sys.executable, "-m", "gradstream.api", "--settings", str(path), *arguments]
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix="api-", suffix=".log", delete=False) as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        yield ApiProcess(process, Path(log.name))
    finally:
        process.kill()
        process.wait()
