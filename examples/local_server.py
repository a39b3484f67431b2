"""A gradstream server as a child process: started, awaited, and stopped in every case."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gradstream.shared.embedded import child as shim

HOST = "127.0.0.1"
STOP_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 10.0
POLL_S = 0.2
# Below those that Linux gives to sockets which name no port: nobody takes one of these between its choice and the server's start.
PORTS = range(10_000, 32_000)
_turns = itertools.count()


class ServerFailed(RuntimeError):
    """The server ended or did not become ready in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A server that answers at url. log is the file with everything that its processes print."""

    url: str
    pid: int
    log: Path


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now, another one at each call and in each process.

    Raises ServerFailed when there is none.
    """
    for _ in PORTS:
        # Processes that were started one after another begin far from each other.
        port = PORTS[(127 * os.getpid() + next(_turns)) % len(PORTS)]
        with suppress(OSError), socket.socket() as probe:
            probe.bind((HOST, port))
            return port
    raise ServerFailed(f"no port from {PORTS.start} to {PORTS.stop - 1} of {HOST} is free")


@contextmanager
def local_server(
    config: Path, *, output_dir: Path, overrides: Mapping[str, str] | None = None, ready_timeout_s: float = 300.0
) -> Iterator[LocalServer]:
    """Run `gradstream serve` with config on a free port until the block ends, however it ends: a killed caller takes it along (Linux).

    overrides: `--server.key value` pairs. Raises ServerFailed when the server is not ready after ready_timeout_s.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = output_dir / "server.log"
    command = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid())]
    command += [str(Path(sys.executable).with_name("gradstream")), "serve", "--config", str(config)]
    command += ["--api-host", HOST, "--api-port", str(port)]
    for key, value in {"output_dir": str(output_dir), **(overrides or {})}.items():
        command += [f"--server.{key}", value]
    # Its own process group: Ctrl-C in the terminal reaches the client only, which then stops the server in order.
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
    server = LocalServer(url=f"http://{HOST}:{port}", pid=process.pid, log=log)
    # An HTTP proxy of the surroundings must not come between the SDK and loopback.
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST]))
    try:
        _wait_until_ready(server, process, ready_timeout_s)
        yield server
    finally:
        _stop(process)


def tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _wait_until_ready(server: LocalServer, process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Return when the server says itself that it is ready: at its address another one could answer. Raises ServerFailed."""
    announcement = f" at {server.url},"
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if announcement in server.log.read_text(encoding="utf-8", errors="replace"):
            return
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with exit code {process.returncode}:\n{tail(server.log)}")
        time.sleep(POLL_S)
    raise ServerFailed(
        f"the server did not say within {timeout_s:.0f} s that it is ready at {server.url}:\n{tail(server.log)}"
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server, at the latest STOP_TIMEOUT_S and KILL_TIMEOUT_S from now. Raises ServerFailed when even a kill does not end it."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        sys.stderr.write(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s and is killed\n")
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(KILL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ServerFailed(f"process {process.pid} did not end within {KILL_TIMEOUT_S:.0f} s of its kill") from error
