"""Runs a whole server: the queue, the gang, housekeeping, exports and the API, from start to a clean stop."""

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import msgspec
import structlog
from rich.console import Console

from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.config import ConfigError, Problem, Settings, write_handover
from gradstream.shared.embedded.binary import NoServerBinary
from gradstream.shared.embedded.config import EmbeddedConfig
from gradstream.shared.embedded.contract import ContractRefused, check_contract
from gradstream.shared.embedded.paths import DataDirInUse
from gradstream.shared.embedded.server import EmbeddedServer, ServerDidNotStart
from gradstream.worker.crew import (
    Crew,
    Rendezvous,
    api_spec,
    exporter_spec,
    gang_spec,
    housekeeping_spec,
    restart_policy,
)
from gradstream.worker.echo import LogTail
from gradstream.worker.engine_watch import EngineWatch, Leaderless, Sight
from gradstream.worker.log_rotation import rotate
from gradstream.worker.run_dir import OutputDirInUse, RunDir
from gradstream.worker.supervise import ConfigFailure, Supervised

_log = structlog.get_logger(__name__)

_TICK_S = 0.1
_LOOK_S = 0.5
_HEALTHZ_TIMEOUT_S = 2.0
_HEALTHY_API_AFTER_S = 60.0
# A gang without its lease has nothing to finish: it could commit nothing.
_STOP_DEAF_GANG_S = 3.0
# torch's own log lines, which surround what a rank said.
_TORCH_NOISE = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d")


class CannotStart(Exception):
    """The server cannot run as configured; str() says what to change."""


class Stop:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) as a flag. Signals after the first one change nothing.

    A plain flag: a handler that took the lock of an event, which its own thread may hold, would wait for ever.
    """

    def __init__(self) -> None:
        self._is_requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for the duration of the block."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, lambda _number, _frame: self.request()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self) -> None:
        self._is_requested = True

    @property
    def is_requested(self) -> bool:
        return self._is_requested

    def wait(self, timeout_s: float) -> None:
        """Return after timeout_s; at once when a stop is requested already."""
        if not self._is_requested:
            time.sleep(timeout_s)


def serve(settings: Settings, *, console: Console, stop: Stop, meet: Rendezvous, clock: Clock | None = None) -> None:
    """Run the server until stop is requested.

    settings are resolved. Raises CannotStart before anything runs, or when a child says that the configuration cannot be served;
    everything that was started has ended when this returns or raises.
    """
    clock = clock or SystemClock()
    _check_port(settings)
    with ExitStack() as stack:
        try:
            run_dir = stack.enter_context(RunDir(Path(settings.output_dir)))
            url, server = _queue(settings, stack)
        except (OutputDirInUse, DataDirInUse, NoServerBinary, ServerDidNotStart, ContractRefused) as error:
            raise CannotStart(str(error)) from error
        except OSError as error:
            raise CannotStart(f"output_dir: {settings.output_dir} cannot be used: {error.strerror}") from error
        handed = msgspec.structs.replace(settings, redis_url=url, lease_owner=run_dir.owner())
        write_handover(handed, run_dir.settings_file)
        watch = stack.enter_context(EngineWatch(url, engine=settings.engine_name))
        crew = _crew(handed, run_dir, meet=meet, clock=clock)
        tails = [LogTail(member.spec.log_file) for member in crew.members]
        stack.callback(crew.stop, timeout_s=settings.stop_timeout_s, clock=clock)
        shift = Shift(settings=handed, crew=crew, watch=watch, server=server, tails=tails, console=console, clock=clock)
        shift.run(stop)
        console.print("stopping: the gang finishes its batch", highlight=False)
    console.print("stopped", highlight=False)


class Shift:
    """The launcher's watch over running processes."""

    def __init__(  # noqa: PLR0913 - the parts of a server, each named
        self,
        *,
        settings: Settings,
        crew: Crew,
        watch: EngineWatch,
        server: EmbeddedServer | None,
        tails: list[LogTail],
        console: Console,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._crew = crew
        self._watch = watch
        self._server = server
        self._tails = tails
        self._console = console
        self._clock = clock
        self._is_ready = False
        self._sight = Sight()
        self._looked_at_s = -_LOOK_S
        # About the gang as it was started last: the engine's epoch before it, and whether it has taken the lease.
        self._num_gangs = 0
        self._epoch_before = 0
        self._has_reported = False
        self._leaderless = Leaderless(limit_s=2 * settings.lease_ttl_s, clock=clock)

    def run(self, stop: Stop) -> None:
        """Start the crew and look after everything until stop is requested. Raises CannotStart when a child cannot be configured."""
        # What a killed launcher's gang left: nobody must take the server for ready because of it.
        self._watch.clear_lease(self._settings.lease_owner)
        self._sight = self._watch.look() or Sight()
        self._crew.start()
        while not stop.is_requested:
            try:
                self._tick()
            except ConfigFailure as failure:
                raise CannotStart(_without_noise(str(failure))) from failure
            stop.wait(_TICK_S)

    def _tick(self) -> None:
        for member in self._crew.members:
            if member.check():
                if member is self._crew.gang:
                    self._watch.clear_lease(self._settings.lease_owner)
                self._mourn(member)
        for tail in self._tails:
            for line in tail.read():
                self._console.print(
                    f"[bold]{line.level}[/bold]", line.text, markup=True, highlight=False, soft_wrap=True
                )
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_at_s >= _LOOK_S:
            self._looked_at_s = now_s
            self._look()

    def _look(self) -> None:
        if self._server is not None and self._server.ensure_running():
            self._say("the queue's server ended and was started again; no accepted job is lost")
        for member in self._crew.members:
            rotate(member.spec.log_file)
        sight = self._watch.look()
        if sight is None:
            self._leaderless.is_overdue(None, should_lead=False)
            return
        if sight.last_batch != self._sight.last_batch:
            self._crew.gang.note_progress()
        self._check_gang(sight)
        self._sight = sight
        is_leading = self._has_reported and sight.card_epoch == sight.epoch
        if is_leading and not self._is_ready:
            if self._api_answers():
                self._is_ready = True
                self._announce()
            else:
                self._check_api()

    def _check_gang(self, sight: Sight) -> None:
        """Start a gang anew that does not take the lease in time, or that lost it and stands still."""
        gang, limit_s = self._crew.gang, self._settings.worker_connection_timeout
        if gang.num_starts != self._num_gangs:
            self._num_gangs, self._epoch_before, self._has_reported = gang.num_starts, self._sight.epoch, False
        is_ours = sight.lease_owner == self._settings.lease_owner
        self._has_reported = self._has_reported or (is_ours and sight.epoch != self._epoch_before)
        should_lead = self._has_reported and gang.pid is not None
        if self._leaderless.is_overdue(sight, should_lead=should_lead):
            self._say(f"the gang runs, but does not renew its lease; it is started again. Log: {gang.spec.log_file}")
            gang.restart(timeout_s=_STOP_DEAF_GANG_S)
            return
        if self._has_reported or gang.pid is None or gang.age_s < limit_s:
            return
        self._say(
            f"the gang did not report for work within worker_connection_timeout: {limit_s:g} s; it is started again. "
            f"A model that takes longer to load needs a higher value. Log: {gang.spec.log_file}"
        )
        gang.restart(timeout_s=self._settings.stop_timeout_s)

    def _check_api(self) -> None:
        """Start an API anew that does not answer in time although there is a gang to serve."""
        api, limit_s = self._crew.api, self._settings.worker_connection_timeout
        if api.pid is None or api.age_s < limit_s:
            return
        self._say(
            f"the API did not answer within worker_connection_timeout: {limit_s:g} s; it is started again. "
            f"Log: {api.spec.log_file}"
        )
        api.restart(timeout_s=self._settings.stop_timeout_s)

    def _mourn(self, member: Supervised) -> None:
        is_outage = member is self._crew.gang and member.num_failures > self._settings.worker_max_retries
        if is_outage:
            self._say(
                f"OUTAGE: the gang failed {member.num_failures} times in a row without finishing a batch "
                f"(worker_max_retries: {self._settings.worker_max_retries}). It is tried again every "
                f"{self._settings.max_restart_backoff_s:g} s at most. The end of {member.spec.log_file}:\n{member.tail(8)}"
            )
        else:
            self._say(f"{member.spec.name} ended and is started again. Log: {member.spec.log_file}")

    def _announce(self) -> None:
        settings = self._settings
        url = url_of(_reachable(settings.api_host), settings.api_port)
        self._say(f"ready: {settings.model_name} at {url}, {settings.num_ranks} rank(s) on {settings.device}")
        if settings.api_keys_file is not None:
            self._say(f"connect with: TINKER_BASE_URL={url} and a key of `gradstream keys add` as TINKER_API_KEY")
        else:
            self._say(f"connect with: TINKER_BASE_URL={url} TINKER_API_KEY=tml-anything")
            self._say(_open_to(settings))
        is_open = settings.api_keys_file is not None or settings.api_without_keys
        if is_open and _reachable(settings.api_host) != settings.api_host:
            self._say(f"from other machines: {url_of(socket.gethostname(), settings.api_port)}")
        self._say(f"logs: {self._crew.gang.spec.log_file.parent}   stop with Ctrl-C")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _api_answers(self) -> bool:
        connection = HTTPConnection(
            _reachable(self._settings.api_host), self._settings.api_port, timeout=_HEALTHZ_TIMEOUT_S
        )
        try:
            connection.request("GET", "/api/v1/healthz")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


def _queue(settings: Settings, stack: ExitStack) -> tuple[str, EmbeddedServer | None]:
    """The URL of the queue's server, which is started here unless there is one already."""
    if settings.redis_url is not None:
        for warning in check_contract(settings.redis_url):
            _log.warning("redis_contract", problem=warning)
        return settings.redis_url, None
    assert settings.redis_data_dir is not None
    config = EmbeddedConfig(
        data_dir=Path(settings.redis_data_dir),
        durability=settings.durability,
        max_memory_bytes=settings.redis_memory_limit,
        binary=Path(settings.redis_binary) if settings.redis_binary else None,
        stop_timeout_s=settings.stop_timeout_s,
    )
    server = stack.enter_context(EmbeddedServer(config))
    return server.url, server


def _crew(settings: Settings, run_dir: RunDir, *, meet: Rendezvous, clock: Clock) -> Crew:
    path = run_dir.settings_file
    # A gang is healthy when it finishes batches, not when it merely lives.
    gang_policy = restart_policy(settings, healthy_after_s=None)
    policy = restart_policy(settings, healthy_after_s=_HEALTHY_API_AFTER_S)
    gang = gang_spec(path, run_dir, settings=settings, meet=meet)
    return Crew(
        gang=Supervised(gang, policy=gang_policy, clock=clock),
        housekeeping=Supervised(housekeeping_spec(path, run_dir), policy=policy, clock=clock),
        exporter=Supervised(exporter_spec(path, run_dir), policy=policy, clock=clock),
        api=Supervised(api_spec(path, run_dir), policy=policy, clock=clock),
    )


def _check_port(settings: Settings) -> None:
    host, port = settings.api_host, settings.api_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        # strerror of `create_server` names the address once more.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        advice = "stop what listens there, or choose another one with --api-port N"
        raise CannotStart(f"api_host {host}, api_port {port}: cannot listen there ({reason}); {advice}") from error


def _open_to(settings: Settings) -> str:
    """What the absence of keys means here."""
    if settings.api_without_keys:
        return "no API keys, as api_without_keys says: whoever reaches this address can use and read everything"
    return "no API keys: only programs on this machine are answered, all as one tenant (docs/security.md)"


def url_of(host: str, port: int) -> str:
    """What a client on this host gives; an IPv6 address stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound


def _without_noise(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and not _TORCH_NOISE.match(line)]
    return "\n".join(lines[-5:]) or "a process refused its configuration without saying why"


def check_rendezvous(*, mode: str, num_nodes: int) -> None:
    """Refuse what the launcher cannot do yet. Raises ConfigError."""
    problems = []
    if mode != "auto":
        problems.append(Problem("--mode", f"{mode!r} is not supported yet; use auto, which starts the gang itself"))
    if num_nodes != 1:
        problems.append(Problem("--nnodes", f"{num_nodes} nodes are not supported yet; use 1"))
    if problems:
        raise ConfigError(problems)
