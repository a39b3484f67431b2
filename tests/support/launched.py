"""`gradstream serve` as a user runs it: the launcher's process, what it says, and the processes it starts."""

import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from examples.local_server import free_port
from gradstream.shared.config import Settings, read_handover
from gradstream.shared.embedded import child as shim

ROOT = Path(__file__).parents[2]
# A machine with other work may take many times as long as an idle one.
READY_S = 240.0
STOPPED_S = 120.0
# On the loopback interface the ranks need no host name that resolves.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


class Server:
    """One `gradstream serve` and everything it says."""

    def __init__(
        self, output_dir: Path, *arguments: str, port: int | None = None, config: str = "configs/tiny.yaml"
    ) -> None:
        """port 0 leaves the choice to the launcher; None is a free one."""
        self.port = free_port() if port is None else port
        self.output_dir = output_dir
        self.said = output_dir.with_name(f"{output_dir.name}-{self.port}.txt")
        # Through the shim, so that a killed test run leaves no server behind.
        command = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid())]
        command += [str(Path(sys.executable).with_name("gradstream")), "serve", "--config", config]
        command += ["--api-port", str(self.port)] if self.port else []
        command += ["--server.output_dir", str(output_dir), *arguments]
        with self.said.open("wb") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.said.read_text()

    def until_ready(self) -> "Server":
        self.until(lambda: "ready: " in self.text)
        return self

    def until(self, condition: Callable[[], object], timeout_s: float = READY_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def health(self) -> int:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.port}/api/v1/healthz", timeout=60) as answer:
                return int(answer.status)
        except OSError:
            return 0

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def member(self, module: str) -> psutil.Process | None:
        """The process that runs `python -m module`."""
        for process in self.family():
            try:
                line = process.cmdline()
            except psutil.Error:
                continue
            if (
                module in line
                and line[line.index(module) - 1] == "-m"
                and "torch" not in " ".join(line[: line.index(module)])
            ):
                return process
        return None

    @property
    def settings(self) -> Settings:
        """What it handed down to its processes."""
        return read_handover(self.output_dir / "run" / "settings.json")

    def end(self) -> None:
        """Stop it in order; kill what does not stop."""
        if self.process.poll() is None:
            family = self.family()
            self.process.terminate()
            try:
                self.process.wait(STOPPED_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            all_gone(family)


def all_gone(processes: list[psutil.Process], timeout_s: float = 60.0) -> bool:
    """Whether none of them runs any more. A zombie does not: its parent reaps it, which may be a process of the machine that is slow."""
    deadline = time.monotonic() + timeout_s
    while any(_runs(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def has_ended(pid: int) -> bool:
    """True when no such process runs any more. A zombie does not: see all_gone."""
    try:
        return not _runs(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


Launch = Callable[..., Server]


@contextmanager
def launching(folder: Path) -> Iterator[Launch]:
    """A function that starts servers with their output below folder; they are stopped after the block."""
    servers: list[Server] = []

    def start(*arguments: str, name: str = "out", **options: object) -> Server:
        servers.append(Server(folder / name, *arguments, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.end()


class HandGang:
    """One machine's part of a gang, as somebody starts it with torchrun."""

    def __init__(self, words: Sequence[str], *, log: Path) -> None:
        """words: behind `torchrun`."""
        self.log = log
        command = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid())]
        command += [str(Path(sys.executable).with_name("torchrun")), *words]
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )  # fmt: skip

    @classmethod
    def of_config(
        cls, config: Path, *overrides: str, log: Path, node: int = 0, num_nodes: int = 1, port: int
    ) -> "HandGang":
        """One rank on a machine."""
        where = [f"--nnodes={num_nodes}", f"--node_rank={node}", "--nproc_per_node=1"]
        where += ["--master_addr=127.0.0.1", f"--master_port={port}"]
        return cls([*where, "-m", "gradstream.worker", "--config", str(config), *overrides], log=log)

    @classmethod
    def of_command(cls, line: str, *, log: Path) -> "HandGang":
        """What the launcher printed, typed as it stands."""
        program, *words = shlex.split(line)
        assert program == "torchrun", line
        return cls(words, log=log)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until_ended(self, timeout_s: float = READY_S) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end within {timeout_s:g} s:\n{self.text[-4000:]}") from None

    def kill(self) -> None:
        """SIGKILL torchrun; its ranks end with it."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        assert all_gone(family), "a rank outlived its torchrun"

    def end(self) -> None:
        """Kill it if it runs."""
        if self.process.poll() is None:
            self.kill()
