"""The launcher's watch over running processes, from their start until a stop is requested."""

import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

from rich.console import Console
from rich.text import Text

from gradstream.shared.clock import Clock
from gradstream.shared.config import Settings
from gradstream.shared.config.agreement import Terms
from gradstream.shared.embedded.server import EmbeddedServer
from gradstream.shared.errors import Unavailable
from gradstream.worker.crew import Crew
from gradstream.worker.echo import LogTail
from gradstream.worker.engine_watch import EngineWatch, Sight
from gradstream.worker.gang_watch import HandGang, OwnGang
from gradstream.worker.log_rotation import rotate
from gradstream.worker.supervise import ConfigFailure, Supervised

_TICK_S = 0.1
_LOOK_S = 0.5
_HEALTHZ_TIMEOUT_S = 2.0
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """Says lines to whoever started the launcher, as they are."""

    console: Console

    def __call__(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posts:
    """What a shift looks after. server None: a queue that others run. terms: what the engine's gangs must agree to."""

    crew: Crew
    gang: OwnGang | HandGang
    watch: EngineWatch
    server: EmbeddedServer | None
    terms: Terms


class Shift:
    """The launcher's watch over running processes."""

    def __init__(self, posts: Posts, *, settings: Settings, say: Voice, clock: Clock) -> None:
        self._settings = settings
        self._posts = posts
        self._crew = posts.crew
        self._say = say
        self._clock = clock
        self._tails = [LogTail(member.spec.log_file) for member in posts.crew.members]
        self._is_ready = False
        self._looked_at_s = -_LOOK_S

    def run(self, stop: Stop) -> None:
        """Start the crew and look after everything until stop is requested. Raises CannotStart when a child cannot be configured."""
        # What a killed launcher's gang left: nobody must take the server for ready because of it.
        self._posts.watch.clear_lease(self._settings.lease_owner)
        self._posts.gang.begin(self._posts.watch.look() or Sight())
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
                    self._posts.watch.clear_lease(self._settings.lease_owner)
                self._mourn(member)
        for tail in self._tails:
            for line in tail.read():
                self._say.console.print(Text(line.level, style="bold"), Text(line.text), soft_wrap=True)
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_at_s >= _LOOK_S:
            self._looked_at_s = now_s
            self._look()

    def _look(self) -> None:
        server, watch = self._posts.server, self._posts.watch
        if server is not None and server.ensure_running():
            self._say("the queue's server ended and was started again; no accepted job is lost")
        for member in self._crew.members:
            rotate(member.spec.log_file)
        sight = watch.look()
        if sight is not None and not sight.has_terms:
            # A Redis that is away again is told at a later look.
            with suppress(Unavailable):
                watch.publish(self._posts.terms)
        if self._posts.gang.check(sight) and not self._is_ready:
            if self._api_answers():
                self._is_ready = True
                self._announce()
            else:
                self._check_api()

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
        where = f" on {settings.device}" if self._crew.gang is not None else ""
        self._say(f"ready: {settings.model_name} at {url}, {settings.num_ranks} rank(s){where}")
        self._say(f"connect with: {_ways_in(settings, url)}")
        if settings.api_keys_file is None:
            self._say(_open_to(settings))
        is_open = settings.api_keys_file is not None or settings.api_without_keys
        if is_open and _reachable(settings.api_host) != settings.api_host:
            self._say(f"from other machines: {url_of(socket.gethostname(), settings.api_port)}")
        self._say(f"logs: {self._crew.api.spec.log_file.parent}   stop with Ctrl-C")

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


def _ways_in(settings: Settings, url: str) -> str:
    """What clients read from their environment. Full weights are trained through the xorl dialect alone."""
    has_keys = settings.api_keys_file is not None
    tinker = f"TINKER_BASE_URL={url}" + ("" if has_keys else " TINKER_API_KEY=tml-anything")
    names = ["TINKER", "XORL"] if settings.enable_lora else ["XORL"]
    key = (
        f" and a key of `gradstream keys add` as {' or '.join(f'{name}_API_KEY' for name in names)}" if has_keys else ""
    )
    return " or ".join([tinker, f"XORL_BASE_URL={url}"][-len(names) :]) + key


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
