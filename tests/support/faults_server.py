"""A real server whose processes can be found by their role, and killed."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path

import httpx
import psutil
import redis

from examples.local_server import free_port
from gradstream.shared.embedded import child as shim
from gradstream.shared.joblog.keys import Keys
from tests.support.launched import all_gone

ROOT = Path(__file__).parents[2]
CONFIG = "configs/tiny.yaml"
# Where the logs of failed tests stay.
KEPT = ROOT / "outputs" / "faults"
_ORDINARY = ('"event": "http_request"', '"event": "batch"')
READY_S = 240.0
# Until what was killed is gone.
GONE_S = 120.0
# Replays must have something to do: a cut after this many seconds of the engine's work.
REPLAY_BUDGET_S = "0.5"
DEFAULTS: Mapping[str, str] = {
    "batch_isolation": "strict",
    "restart_backoff_s": "0.1",
    "max_restart_backoff_s": "1",
    "poll_hold_s": "5",
    "snapshot_replay_budget_s": REPLAY_BUDGET_S,
    # Of three models one is parked, in a file.
    "max_active_adapters": "2",
    "adapter_host_memory": "0",
}


class Role(StrEnum):
    """What a process of a server is there for. EVERYTHING: the launcher and all that it started."""

    API = "api"
    RANK0 = "rank 0"
    PEER = "peer rank"
    TORCHRUN = "torchrun"
    HOUSEKEEPING = "housekeeping"
    EXPORTER = "exporter"
    QUEUE = "queue server"
    LAUNCHER = "launcher"
    EVERYTHING = "everything"


# The last word of these command lines' `-m MODULE`.
_MODULES = {
    "gradstream.api": Role.API,
    "gradstream.worker.torchrun": Role.TORCHRUN,
    "gradstream.worker.housekeeping": Role.HOUSEKEEPING,
    "gradstream.worker.exporter": Role.EXPORTER,
}


class Server:
    """`gradstream serve` in an output directory of its own. It can be killed, and started again on the same port and directory."""

    def __init__(
        self,
        output_dir: Path,
        overrides: Mapping[str, str] | None = None,
        *,
        said: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.output_dir = output_dir
        self.environment = {**os.environ, **(environment or {})}
        self.overrides = {**DEFAULTS, **(overrides or {})}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = said or output_dir.with_name(f"{output_dir.name}.txt")
        self.num_launches = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._handed = output_dir / "run" / "settings.json"

    def launch(self) -> None:
        """Start the launcher; what it says is appended to `said`. The server ends with the test process in every case."""
        command = [sys.executable, "-I", "-S", shim.__file__, str(os.getpid())]
        command += [str(Path(sys.executable).with_name("gradstream")), "serve", "--config", CONFIG]
        command += ["--api-port", str(self.port), "--server.output_dir", str(self.output_dir)]
        for name, value in self.overrides.items():
            command += [f"--server.{name}", value]
        self.num_launches += 1
        self.said.parent.mkdir(parents=True, exist_ok=True)
        with self.said.open("ab") as sink:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                cwd=ROOT,
                env=self.environment,
                start_new_session=True,
            )

    def launch_until_ready(self) -> "Server":
        """Start it, and return when it answers; the first port of call of every test."""
        self.launch()
        self.until(self.is_serving, what="the server is ready")
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "launch() was not called"
        return self._process

    @property
    def is_up(self) -> bool:
        """True while the launcher lives."""
        return self._process is not None and self._process.poll() is None

    def until(self, condition: Callable[[], object], *, what: str, timeout_s: float = READY_S) -> None:
        """Return when condition holds; fails the test when the launcher ends or timeout_s is over before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.is_up, f"waiting until {what}: the launcher ended\n{self.evidence()}"
            assert time.monotonic() < deadline, f"not so within {timeout_s:g} s: {what}\n{self.evidence()}"
            time.sleep(0.05)

    def is_serving(self) -> bool:
        """True when the API answers and the gang of the newest epoch holds the lease and has shown its card."""
        if not self.is_up or not self._handed.exists():
            return False
        with suppress(httpx.TransportError, redis.RedisError, OSError, json.JSONDecodeError):
            if httpx.get(f"{self.url}/api/v1/healthz", timeout=10, trust_env=False).status_code != 200:
                return False
            with self.redis() as client:
                epoch, card, lease = client.mget(self.keys.epoch, self.keys.card, self.keys.lease)
            return lease is not None and card is not None and f'"epoch":{(epoch or b"?").decode()}' in card.decode()
        return False

    @property
    def keys(self) -> Keys:
        return Keys(self.overrides.get("engine_name", "main"))

    @contextmanager
    def redis(self) -> Iterator["redis.Redis"]:
        """A connection to the queue's server as the launcher's settings name it."""
        url = json.loads(self._handed.read_bytes())["redis_url"]
        with redis.Redis.from_url(url, socket_timeout=60) as client:
            yield client

    def epoch(self) -> int:
        with self.redis() as client:
            return int(client.get(self.keys.epoch) or 0)

    def processes(self) -> dict[Role, list[psutil.Process]]:
        """The living processes by role."""
        found: dict[Role, list[psutil.Process]] = {}
        if not self.is_up:
            return found
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                role = Role.LAUNCHER if process.pid == launcher.pid else role_of(process)
                if role is not None:
                    found.setdefault(role, []).append(process)
        return found

    def member(self, role: Role) -> psutil.Process:
        """The one process of this role (of the peers: the first). Fails the test when there is none within READY_S."""
        deadline = time.monotonic() + READY_S
        while True:
            members = self.processes().get(role, [])
            if members:
                return members[0]
            assert time.monotonic() < deadline, f"no {role} runs\n{self.evidence()}"
            time.sleep(0.02)

    def kill(self, role: Role) -> bool:
        """SIGKILL the processes of this role, as they are now; a dead launcher is started again. False when none ran."""
        found = self.processes()
        match role:
            case Role.EVERYTHING:
                victims = [*found.get(Role.LAUNCHER, []), *(one for group in found.values() for one in group)]
            case Role.PEER:
                victims = found.get(role, [])[:1]
            case _:
                victims = found.get(role, [])
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if role in (Role.LAUNCHER, Role.EVERYTHING):
            self.relaunch(family=[one for group in found.values() for one in group])
        return bool(victims)

    def crash(self) -> None:
        """SIGKILL everything and leave it dead, for damage that is done while nothing runs."""
        family = [one for group in self.processes().values() for one in group]
        for process in sorted(family, key=lambda one: one.pid != self.process.pid):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(GONE_S)
        all_gone([one for one in family if one.pid != self.process.pid], GONE_S)

    def relaunch(self, family: list[psutil.Process]) -> None:
        """Wait for the end of a killed launcher and its family, then start it again."""
        self.process.wait(GONE_S)
        others = [one for one in family if one.pid != self.process.pid]
        assert all_gone(others, GONE_S), f"outlived their launcher by {GONE_S:g} s: {others}\n{self.evidence()}"
        self.launch()

    def stop(self) -> None:
        """End it at once: what an orderly stop does is tested elsewhere, and takes seconds."""
        if self.is_up:
            self.crash()

    def events(self, name: str) -> list[dict[str, object]]:
        """What the gangs, then what the launchers logged under this name, oldest first; a line that a kill tore is left out."""
        paths = [self.output_dir / "logs" / "gang.log", self.said]
        found = []
        for line in (line for path in paths if path.is_file() for line in _lines(path)):
            if f'"event": "{name}"' in line:
                with suppress(json.JSONDecodeError):
                    found.append(json.loads(line))
        return found

    def evidence(self, num_lines: int = 12) -> str:
        """The end of what the processes logged, the ordinary left out, for a failure's message. Everything is kept in KEPT."""
        kept = KEPT / self.output_dir.parent.name
        shutil.rmtree(kept, ignore_errors=True)
        texts = [f"all logs: {kept}"]
        for path in (self.said, *sorted((self.output_dir / "logs").glob("*.log"))):
            if path.is_file():
                kept.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, kept / path.name)
                lines = [line for line in _lines(path) if not any(word in line for word in _ORDINARY)]
                texts.append(f"--- {path.name}\n" + "\n".join(line[:400] for line in lines[-num_lines:]))
        return "\n".join(texts)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def role_of(process: psutil.Process) -> Role | None:
    """The role that a command line gives a process of a server, None for others and for the dead."""
    try:
        words, name = process.cmdline(), process.name()
        if name.startswith(("valkey-server", "redis-server")):
            return Role.QUEUE
        module = words[words.index("-m") + 1] if "-m" in words else ""
        if module == "gradstream.worker":
            return Role.RANK0 if process.environ().get("RANK", "0") == "0" else Role.PEER
        return _MODULES.get(module)
    except (psutil.Error, OSError):
        return None


@contextmanager
def serving(output_dir: Path, overrides: Mapping[str, str] | None = None) -> Iterator[Server]:
    """A server that is ready when the block begins and gone after it."""
    server = Server(output_dir, overrides)
    try:
        yield server.launch_until_ready()
    finally:
        server.stop()
