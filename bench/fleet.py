"""Client processes as seen from the bench: started together, told together, stopped together."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class ClientProcess:
    """One `bench.client`. ask() sends a command and returns its answer; send() and receive() do the halves."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def send(self, do: str, times: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "times": times}) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest command without one; raises RuntimeError when the client has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a client ended with exit code {self._process.wait()}; its words are on stderr")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, do: str, times: int) -> dict[str, Any]:
        self.send(do, times)
        return self.receive()


@contextmanager
def clients(count: int, *, url: str, base_model: str) -> Iterator[list[ClientProcess]]:
    """That many clients, each with its own model; they end with the block."""
    command = [sys.executable, "-m", "bench.client", "--url", url, "--base-model", base_model]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    try:
        yield [ClientProcess(process) for process in processes]
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
