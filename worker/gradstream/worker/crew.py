"""The processes of one server: their command lines, and the order in which they stop."""

import math
import sys
from pathlib import Path

from gradstream.shared.clock import Clock
from gradstream.shared.config import Settings
from gradstream.worker.rendezvous import LOOPBACK, Rendezvous
from gradstream.worker.run_dir import RunDir
from gradstream.worker.supervise import ChildSpec, RestartPolicy, Supervised


def api_spec(settings_file: Path, run_dir: RunDir) -> ChildSpec:
    """The HTTP edge."""
    argv = [sys.executable, "-m", "gradstream.api", "--settings", str(settings_file)]
    return ChildSpec(name="api", argv=argv, log_file=run_dir.log_file("api"), environment=_environment(num_threads=1))


def housekeeping_spec(settings_file: Path, run_dir: RunDir) -> ChildSpec:
    """Sweeps beside the gang."""
    argv = [sys.executable, "-m", "gradstream.worker.housekeeping", "--settings", str(settings_file)]
    name = "housekeeping"
    return ChildSpec(name=name, argv=argv, log_file=run_dir.log_file(name), environment=_environment(num_threads=1))


def exporter_spec(settings_file: Path, run_dir: RunDir) -> ChildSpec:
    """Exports beside the gang, each in a process of its own."""
    argv = [sys.executable, "-m", "gradstream.worker.exporter", "--settings", str(settings_file)]
    name = "exports"
    return ChildSpec(name=name, argv=argv, log_file=run_dir.log_file(name), environment=_environment(num_threads=1))


def gang_spec(settings_file: Path, run_dir: RunDir, *, settings: Settings, meet: Rendezvous) -> ChildSpec:
    """The ranks on this machine, the first of the gang, under torchrun, which never restarts them: the supervisor does."""
    where = ["--standalone", "--local-addr", meet.address]
    if meet.port is not None:
        where = ["--nnodes", str(meet.num_nodes), "--node-rank", "0"]
        where += ["--master-addr", meet.address, "--master-port", str(meet.port)]
    argv = [sys.executable, "-m", "gradstream.worker.torchrun", *where]
    argv += ["--nproc-per-node", str(meet.ranks_per_node(settings.num_ranks)), "--max-restarts", "0"]
    argv += ["-m", "gradstream.worker", "--settings", str(settings_file)]
    environment = _environment(num_threads=settings.torch_threads or 1)
    # torchrun must not cut the ranks' last batch short.
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(settings.stop_timeout_s))
    if meet.address == LOOPBACK and sys.platform == "linux":
        # The ranks' sockets stay off the network, and a host name that does not resolve does no harm.
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    return ChildSpec(name="gang", argv=argv, log_file=run_dir.log_file("gang"), environment=environment)


def restart_policy(settings: Settings, *, healthy_after_s: float | None) -> RestartPolicy:
    """The pauses that the settings ask for."""
    return RestartPolicy(
        first_pause_s=settings.restart_backoff_s,
        longest_pause_s=settings.max_restart_backoff_s,
        healthy_after_s=healthy_after_s,
    )


class Crew:
    """The supervised processes in the order of their start: gang, housekeeping, exports, API. gang None: others start it."""

    def __init__(
        self, *, gang: Supervised | None, housekeeping: Supervised, exporter: Supervised, api: Supervised
    ) -> None:
        self.gang = gang
        self.housekeeping = housekeeping
        self.exporter = exporter
        self.api = api

    @property
    def members(self) -> tuple[Supervised, ...]:
        beside = (self.housekeeping, self.exporter, self.api)
        return beside if self.gang is None else (self.gang, *beside)

    def start(self) -> None:
        for member in self.members:
            member.start()

    def stop(self, *, timeout_s: float, clock: Clock) -> None:
        """Stop the last started first, so that the API takes no more jobs while the gang finishes its batch.

        All together have timeout_s; what is left then is killed.
        """
        deadline_s = clock.monotonic_s() + timeout_s
        for member in reversed(self.members):
            member.request_stop()
            member.finish(timeout_s=max(0.1, deadline_s - clock.monotonic_s()))


def _environment(*, num_threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(num_threads),
        # Threads that wait for each other sleep instead of spinning: the API, the queue and the clients often share the cores.
        # On a busy 2-core machine spinning takes about four times as long (python -m bench.waiting).
        "OMP_WAIT_POLICY": "passive",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
