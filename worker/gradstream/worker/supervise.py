"""One child process that is started again when it ends, with growing pauses."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import assert_never

import structlog

from gradstream.shared.clock import Clock
from gradstream.shared.config import EXIT_CONFIG
from gradstream.shared.config.machine import child_environment
from gradstream.shared.embedded import child as shim

_log = structlog.get_logger(__name__)

_KILLED_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """What to run. argv[0] is a program's path. Standard output and error are appended to log_file."""

    name: str
    argv: Sequence[str]
    log_file: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """The pause before a restart starts at first_pause_s and doubles up to longest_pause_s.

    A child that ran for healthy_after_s starts the count anew; None = only note_progress does.
    """

    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    healthy_after_s: float | None = 60.0

    def pause_s(self, num_failures: int) -> float:
        """Seconds to wait after the nth failure in a row, n from 1."""
        return float(min(self.longest_pause_s, self.first_pause_s * 2 ** min(num_failures - 1, 30)))


class ConfigFailure(Exception):
    """A child ended with EXIT_CONFIG. str() is what it said last."""


class _State(Enum):
    STOPPED = "stopped"
    RUNNING = "running"
    PAUSED = "paused"


class Supervised:
    """Keeps one child running. The owner calls check() a few times a second, from the thread that called start()."""

    def __init__(self, spec: ChildSpec, *, policy: RestartPolicy, clock: Clock) -> None:
        self.spec = spec
        self.num_failures = 0
        self.num_starts = 0
        self._policy = policy
        self._clock = clock
        self._state = _State.STOPPED
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._started_at_s = 0.0
        self._restart_at_s = 0.0

    @property
    def pid(self) -> int | None:
        """The running child's process id."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def age_s(self) -> float:
        """Seconds since the last start."""
        return self._clock.monotonic_s() - self._started_at_s

    def start(self) -> None:
        """Start the child in a session of its own; it is asked to stop when this process ends, however it ends."""
        self.spec.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log_file.open("ab") as log:
            self._log_start = log.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", shim.__file__, str(os.getpid()), *self.spec.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environment(**self.spec.environment),
                start_new_session=True,
            )
        self._state = _State.RUNNING
        self._started_at_s = self._clock.monotonic_s()
        self.num_starts += 1
        _log.debug("child_started", child=self.spec.name, pid=self._process.pid, num_starts=self.num_starts)

    def note_progress(self) -> None:
        """The child did useful work: the next failure is the first of a new row."""
        self.num_failures = 0

    def check(self) -> bool:
        """Look after the child; True when it was found dead by this call. Starts it again when its pause is over.

        Raises ConfigFailure when it ended with EXIT_CONFIG.
        """
        match self._state:
            case _State.STOPPED:
                return False
            case _State.RUNNING:
                assert self._process is not None
                code = self._process.poll()
                if code is None:
                    return False
                self._bury(code)
                return True
            case _State.PAUSED:
                if self._clock.monotonic_s() >= self._restart_at_s:
                    self.start()
                return False
            case _:
                assert_never(self._state)

    def request_stop(self) -> None:
        """Ask the child to stop; it is not started again."""
        self._state = _State.STOPPED
        if self.pid is not None:
            self._signal(signal.SIGTERM)

    def restart(self, *, timeout_s: float) -> None:
        """Stop a child that hangs; check() then counts a failure and starts it again."""
        self._signal(signal.SIGTERM)
        self._await_end(timeout_s)

    def finish(self, *, timeout_s: float) -> None:
        """Wait for the end after request_stop, for at most timeout_s; then kill what is left of its process group."""
        self._state = _State.STOPPED
        self._await_end(timeout_s)

    def tail(self, num_lines: int = 20) -> str:
        """The last lines that this start of the child wrote."""
        with self.spec.log_file.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            # A log that was rotated since then may be shorter than it was at that start.
            start = self._log_start if self._log_start <= end else 0
            log.seek(max(start, end - 64 * 1024))
            lines = log.read().decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-num_lines:])

    def _bury(self, code: int) -> None:
        age_s = self.age_s
        # Helpers of its group must not outlive it.
        self._signal(signal.SIGKILL)
        if code == EXIT_CONFIG:
            self._state = _State.STOPPED
            raise ConfigFailure(self.tail())
        healthy_s = self._policy.healthy_after_s
        if healthy_s is not None and age_s >= healthy_s:
            self.num_failures = 0
        self.num_failures += 1
        pause_s = self._policy.pause_s(self.num_failures)
        self._state = _State.PAUSED
        self._restart_at_s = self._clock.monotonic_s() + pause_s
        _log.error(
            "child_ended",
            child=self.spec.name,
            exit_code=code,
            after_s=round(age_s, 1),
            num_failures=self.num_failures,
            restart_in_s=pause_s,
            log_file=str(self.spec.log_file),
        )

    def _await_end(self, timeout_s: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.warning("child_killed", child=self.spec.name, pid=self._process.pid, waited_s=timeout_s)
            self._signal(signal.SIGKILL)
            self._await_kill()
        # Helpers of its group must not outlive it.
        self._signal(signal.SIGKILL)

    def _await_kill(self) -> None:
        assert self._process is not None
        try:
            self._process.wait(_KILLED_WITHIN_S)
        except subprocess.TimeoutExpired:
            # Only the kernel can hold it now, for instance in a read of a file system that is gone.
            _log.error("child_survives_kill", child=self.spec.name, pid=self._process.pid, waited_s=_KILLED_WITHIN_S)

    def _signal(self, number: signal.Signals) -> None:
        """SIGTERM goes to the child, which knows how to stop its own; SIGKILL to its whole process group."""
        assert self._process is not None
        try:
            if number == signal.SIGKILL:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)
        except ProcessLookupError:
            pass
