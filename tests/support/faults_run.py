"""One run under faults: a server, its clients, the faults that were put on it, and the verdict at the end."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import redis

from gradstream.shared.joblog.port import RecordKind
from tests.support.faults_client import GROUP
from tests.support.faults_footprint import Footprint, footprint, growth
from tests.support.faults_ledger import Ledger, settled_ledger, violations
from tests.support.faults_report import Recovery, Report
from tests.support.faults_server import Role, Server
from tests.support.faults_workload import Reference, Workload, compare, differences, upto

# How many differences a failure lists.
_MAX_LINES = 12


class Run:
    """A server with clients at work. reference gives the unharmed run; it is asked for at the end only."""

    def __init__(self, server: Server, reference: Callable[[], Reference], *, report: Report, test: str) -> None:
        self.server = server
        self.workload = Workload(server.url, server.output_dir)
        self.faults: list[str] = []
        self._reference = reference
        self._report = report
        self._test = test
        self._before: Footprint | None = None

    def open(self) -> None:
        """Create the models, do a first round on the unharmed server, and let the clients go on by themselves."""
        self.workload.open()
        for client in self.workload.clients:
            client.run_round()
        self._before = footprint(self.server)
        self.workload.start()

    def close(self) -> None:
        self.workload.close()

    def kill(self, role: Role) -> None:
        """Kill, and wait until the server serves again. Records the recovery time."""
        # After a kill that was not waited for, it may not run again yet.
        self.server.until(lambda: role is Role.EVERYTHING or role in self.server.processes(), what=f"{role} runs")
        epoch = self.epoch() if role in (Role.RANK0, Role.PEER, Role.TORCHRUN) else None
        at_s = time.monotonic()
        self.faults.append(f"{at_s:.1f} kill {role}")
        assert self.server.kill(role), f"no {role} runs\n{self.server.evidence()}"
        if epoch is not None:
            self.server.until(lambda: self.epoch() > epoch, what=f"a new epoch begins after the kill of {role}")
        self.recovered(f"kill -9 {role}", at_s=at_s)

    def kill_only(self, role: Role) -> None:
        """Kill whatever runs of this role, and do not wait for anything."""
        self.faults.append(f"{time.monotonic():.1f} kill {role}, not waited for")
        self.server.kill(role)

    def recovered(self, fault: str, *, at_s: float) -> None:
        """Wait until the server serves and a client was answered, both after the fault at at_s; records the times."""
        self.server.until(self.server.is_serving, what=f"it serves again after {fault}")
        serving_s = time.monotonic()
        self.until_answered(after_s=serving_s)
        pause_s = self.workload.progress.longest_pause_s(since_s=at_s, until_s=serving_s)
        self._report.add(Recovery(test=self._test, fault=fault, serving_s=serving_s - at_s, pause_s=pause_s))

    def until_answered(self, *, after_s: float | None = None, count: int = 1, timeout_s: float = 240.0) -> None:
        """Return when clients got `count` answers after this moment (now). Fails the test when a client ended, or in time."""
        start_s = time.monotonic() if after_s is None else after_s
        deadline = time.monotonic() + timeout_s
        progress = self.workload.progress
        while sum(1 for at_s in progress.times_s[-4 * count :] if at_s > start_s) < count:
            self.workload.check()
            assert time.monotonic() < deadline, f"no client was answered for {timeout_s:g} s\n{self.server.evidence()}"
            time.sleep(0.02)

    def lost_models(self) -> dict[str, str]:
        """The clients' present models whose state is lost, each with the reason on its record."""
        found: dict[str, str] = {}
        with self.server.redis() as client:
            for model in (one.model_ids[-1] for one in self.workload.clients):
                state, error = client.hmget(self.server.keys.record(RecordKind.MODEL, model), "state", "error")
                if state == b"lost":
                    found[model] = (error or b"").decode()
        return found

    def verdict_of_a_loss(self, lost: Iterable[str]) -> None:
        """Let the clients, which stand, go on with lost models: one is told so, every invariant holds, no number is wrong."""
        told = ""
        try:
            self.workload.finish(min_rounds=max(client.round for client in self.workload.clients) + GROUP)
        except Exception as error:  # noqa: BLE001  whatever the SDK raises, the words in it are compared
            told = str(error)
        lines = [] if any(f"model {model} was lost" in told for model in lost) else [f"lost, but told: {told!r}"]
        with self.server.redis() as client:
            lines += violations(settled_ledger(client, self.server.keys))
        lines += self.differences()
        assert not lines, self._story(lines)

    def differences(self) -> list[str]:
        """How what clients have noted so far differs from the unharmed run, what is missing left out. They may be at work."""
        lines = []
        for client in self.workload.clients:
            rounds = client.round + 1
            found = upto(dict(client.diary), rounds=rounds)
            expected = self._reference().diary_of(client.number, rounds=rounds)
            lines += [line for line in differences(found, expected) if ": missing " not in line]
        return lines

    def check_so_far(self) -> None:
        """Fail the test when a client has noted something else than the unharmed run's."""
        lines = self.differences()
        assert not lines, self._story(lines)

    def verdict(self, *, min_rounds: int = GROUP, exact: bool = True) -> Ledger:
        """Let the clients come to an end, then check every invariant; the ledger. exact False leaves the numbers out."""
        try:
            self.workload.finish(min_rounds=min_rounds)
        except Exception as error:
            raise AssertionError(self._story([f"a client failed: {error!r}"])) from error
        lines = [] if not exact else list(compare(self.workload, self._reference()))
        lines += self._downloads() if exact else []
        self.server.until(self.server.is_serving, what="it serves at the end")
        with self.server.redis() as client:
            ledger = settled_ledger(client, self.server.keys)
        lines += violations(ledger)
        if self._before is not None:
            lines += growth(self._before, footprint(self.server))
        assert not lines, self._story(lines)
        return ledger

    def _downloads(self) -> list[str]:
        """What clients download must be what the last save holds."""
        lines = []
        for client in self.workload.clients:
            saved = client.diary[f"client {client.number} round {client.round - 1} saved adapter_model.safetensors"]
            if (downloaded := client.final_weights()) != saved:
                lines.append(f"client {client.number} downloaded {downloaded}, its last save holds {saved}")
        return lines

    def epoch(self) -> int:
        """The epoch, 0 while the queue server does not answer."""
        with suppress(redis.RedisError, OSError):
            return self.server.epoch()
        return 0

    def _story(self, lines: list[str]) -> str:
        more = [f"... and {len(lines) - _MAX_LINES} more"] if len(lines) > _MAX_LINES else []
        faults = ["faults:", *(f"  {fault}" for fault in self.faults[-30:])]
        return "\n".join([*lines[:_MAX_LINES], *more, *faults, self.server.evidence()])
