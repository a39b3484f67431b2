"""Servers, clients and the unharmed run that faulty ones are compared with."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from _pytest.mark import ParameterSet
from tests.support.faults_proxy import Proxy, owner_of_port
from tests.support.faults_report import REPORT, Report
from tests.support.faults_run import Run
from tests.support.faults_server import Server, role_of, serving
from tests.support.faults_workload import Reference
from tests.support.redis_server import running_server

from gradstream.shared.embedded.server import EmbeddedServer

_REPORT = Report()
SEED_VARIABLE, KILLS_VARIABLE = "GRADSTREAM_FAULT_SEED", "GRADSTREAM_FAULT_KILLS"
DEFAULT_SEED, DEFAULT_KILLS = 20260, 20

StartRun = Callable[..., Run]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest tests/faults`; a run that begins further up takes the variables."""
    parser.addoption("--fault-seed", type=int, help=f"seed of the random kills, also {SEED_VARIABLE}")
    parser.addoption("--fault-kills", type=int, help=f"number of random kills, also {KILLS_VARIABLE}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long recoveries took."""
    if _REPORT.recoveries:
        terminalreporter.section("recovery times")
        for line in _REPORT.table():
            terminalreporter.write_line(line)
        terminalreporter.write_line(f"each one: {REPORT}")


@pytest.fixture(scope="session")
def report() -> Iterator[Report]:
    """Where tests put their recovery times."""
    yield _REPORT
    _REPORT.write()


@pytest.fixture(scope="session")
def fault_seed(request: pytest.FixtureRequest) -> int:
    """The seed of the random kills."""
    given = request.config.getoption("--fault-seed", default=None)
    return int(os.environ.get(SEED_VARIABLE, DEFAULT_SEED)) if given is None else int(given)


@pytest.fixture(scope="session")
def fault_kills(request: pytest.FixtureRequest) -> int:
    """How many random kills there are."""
    given = request.config.getoption("--fault-kills", default=None)
    return int(os.environ.get(KILLS_VARIABLE, DEFAULT_KILLS)) if given is None else int(given)


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Reference]]:
    """The unharmed run by the number of ranks; each lives until the session ends and goes as far as it is asked for."""
    known: dict[int, Reference] = {}
    with ExitStack() as stack:

        def reference(num_ranks: int) -> Reference:
            if num_ranks not in known:
                directory = tmp_path_factory.mktemp(f"unharmed-{num_ranks}") / "out"
                server = stack.enter_context(serving(directory, ranks(num_ranks)))
                known[num_ranks] = Reference(server.url, directory)
                stack.callback(known[num_ranks].close)
            return known[num_ranks]

        yield reference


@pytest.fixture
def start_run(
    tmp_path: Path, references: Callable[[int], Reference], report: Report, request: pytest.FixtureRequest
) -> Iterator[StartRun]:
    """Starts a server with clients at work; what is still running at the end of the test is stopped."""
    with ExitStack() as stack:

        def start(
            overrides: Mapping[str, str] | None = None,
            *,
            num_ranks: int = 1,
            directory: Path = tmp_path,
            environment: Mapping[str, str] | None = None,
        ) -> Run:
            server = Server(
                directory / "out",
                {**(overrides or {}), **ranks(num_ranks)},
                said=tmp_path / "said.txt",
                environment=environment,
            )
            stack.callback(server.stop)
            server.launch_until_ready()
            run = Run(server, lambda: references(num_ranks), report=report, test=request.node.name)
            stack.callback(run.close)
            run.open()
            return run

        yield start


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxied:
    """A run whose queue server is its own process, behind a proxy."""

    run: Run
    proxy: Proxy
    queue: EmbeddedServer


@pytest.fixture
def proxied(start_run: StartRun) -> Iterator[Proxied]:
    """A server with clients at work, with a proxy between its processes and its queue server."""

    def who(port: int) -> str:
        owner = owner_of_port(port)
        return "" if owner is None else str(role_of(owner) or "")

    # A short directory: the path of a Unix socket has an end.
    with running_server(durability="always") as queue:
        proxy = Proxy(urlsplit(queue.url).path, who=who)
        proxy.start()
        try:
            # Snapshots come by often, so that every script does.
            run = start_run({"redis_url": proxy.url, "snapshot_replay_budget_s": "0.1"})
            try:
                yield Proxied(run=run, proxy=proxy, queue=queue)
            finally:
                run.close()
                run.server.stop()
        finally:
            proxy.close()


def cases(values: Iterable[object], *, num_short: int = 1) -> list[ParameterSet]:
    """The parameters of a fault's cases: `make test` runs the first num_short, `make torture` all."""
    return [pytest.param(one, marks=[pytest.mark.slow] * (index >= num_short)) for index, one in enumerate(values)]


def ranks(num_ranks: int) -> dict[str, str]:
    """The settings of a gang of this size."""
    if num_ranks == 1:
        return {}
    return {
        "num_ranks": str(num_ranks),
        "data_parallel_replicate_size": str(num_ranks),
    }
