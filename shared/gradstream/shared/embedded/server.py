"""The embedded server's supervisor."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, RedisError
from redis.retry import Retry

from gradstream.shared.clock import Clock, SystemClock
from gradstream.shared.embedded import child, paths
from gradstream.shared.embedded.binary import find_binary
from gradstream.shared.embedded.config import EmbeddedConfig, config_text

_log = structlog.get_logger(__name__)
_POLL_S = 0.01
_PING_TIMEOUT_S = 2.0
_KILLED_WITHIN_S = 10.0
_FIRST_BACKOFF_S = 0.2
_LONGEST_BACKOFF_S = 10.0
# After this long the next crash is a new story.
_HEALTHY_AFTER_S = 60.0


class ServerDidNotStart(Exception):
    """The server process ended or stayed silent. The message carries the end of its log."""


class EmbeddedServer:
    """Runs one valkey or redis server on a data directory of its own.

    The server ends with the thread that started it (Linux): call start and ensure_running from a thread that lives as long
    as the server is wanted, normally the main one. Not for concurrent use.
    """

    def __init__(self, config: EmbeddedConfig, *, clock: Clock | None = None) -> None:
        self._config = config
        self._clock = clock or SystemClock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: int | None = None
        self._url = ""
        self._client: redis.Redis | None = None
        self._started_at_s = 0.0
        self._backoff_s = 0.0
        self._retry_at_s: float | None = None

    @property
    def url(self) -> str:
        """How clients reach it; carries the password when a port is used. Known after start."""
        assert self._url, "start() was not called"
        return self._url

    @property
    def pid(self) -> int | None:
        """Process id of the running server."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def log_file(self) -> Path:
        return self._config.data_dir.resolve() / "redis.log"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and wait until it serves.

        Raises NoServerBinary, DataDirInUse or ServerDidNotStart; nothing is left running then.
        """
        self._lock = paths.lock_data_dir(self._config.data_dir)
        try:
            self._launch()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server with SIGTERM (it syncs its log), with SIGKILL after stop_timeout_s, and free the directory."""
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self._config.stop_timeout_s)
            except subprocess.TimeoutExpired:
                _log.warning("queue_server_killed", pid=self._process.pid)
                self._process.kill()
                try:
                    self._process.wait(_KILLED_WITHIN_S)
                except subprocess.TimeoutExpired:
                    # Only the kernel can hold it now, for instance in a write to a file system that is gone.
                    _log.error("queue_server_survives_kill", pid=self._process.pid, waited_s=_KILLED_WITHIN_S)
        self._process = None
        if self._lock is not None:
            if self._config.port is None:
                paths.remove_socket(self._config.data_dir)
            os.close(self._lock)
            self._lock = None

    def ping(self) -> bool:
        """True when the server answers now."""
        try:
            return self._answers()
        except RedisError:
            return False

    def ensure_running(self) -> bool:
        """Start the server again if its process has ended; True when this call did so.

        Attempts that fail are spaced out up to 10 s; between them the call returns False at once. Call it every second or so.
        """
        assert self._lock is not None, "start() was not called"
        if self._process is not None and self._process.poll() is None:
            return False
        now_s = self._clock.monotonic_s()
        if self._retry_at_s is None:
            was_healthy = now_s - self._started_at_s > _HEALTHY_AFTER_S
            self._backoff_s = _FIRST_BACKOFF_S if was_healthy else max(_FIRST_BACKOFF_S, self._backoff_s * 2)
            self._backoff_s = min(self._backoff_s, _LONGEST_BACKOFF_S)
            self._retry_at_s = now_s + self._backoff_s
            _log.error("queue_server_ended", exit_code=self._process.returncode if self._process else None)
        if now_s < self._retry_at_s:
            return False
        self._retry_at_s = None
        try:
            self._launch()
        except (ServerDidNotStart, OSError) as error:
            _log.error("queue_server_restart_failed", error=str(error))
            return False
        return True

    def _launch(self) -> None:
        config, data_dir = self._config, self._config.data_dir.resolve()
        binary = find_binary(config.binary)
        socket = password = None
        if config.port is None:
            socket = paths.socket_path(data_dir)
            socket.unlink(missing_ok=True)
            self._url = f"unix://{quote(str(socket))}"
        else:
            password = paths.password(data_dir)
            self._url = f"redis://:{password}@127.0.0.1:{config.port}/0"
        paths.remove_unfinished(data_dir)
        paths.rotate(self.log_file)
        conf = data_dir / "redis.conf"
        paths.write_private(conf, config_text(config, socket=socket, password=password, log_file=self.log_file))
        assert self._lock is not None
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", child.__file__, str(os.getpid()), str(binary), str(conf)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # As long as the server lives, even as an orphan, nobody else starts on its directory.
                pass_fds=(self._lock,),
            )
        self._started_at_s = self._clock.monotonic_s()
        self._wait_until_it_serves()

    def _wait_until_it_serves(self) -> None:
        assert self._process is not None
        start_s = self._clock.monotonic_s()
        while True:
            if self._process.poll() is not None:
                raise ServerDidNotStart(
                    f"the queue server ended with code {self._process.returncode}; the end of {self.log_file}:\n"
                    f"{paths.tail(self.log_file)}"
                )
            waited_s = self._clock.monotonic_s() - start_s
            limit_s = self._config.start_timeout_s
            try:
                if self._answers():
                    return
            except BusyLoadingError:
                limit_s = self._config.load_timeout_s
            except RedisError:
                # Not listening yet.
                pass
            if waited_s > limit_s:
                raise ServerDidNotStart(f"the queue server did not answer within {limit_s:.0f} s; see {self.log_file}")
            time.sleep(_POLL_S)

    def _answers(self) -> bool:
        if self._client is None:
            self._client = redis.Redis.from_url(
                self._url,
                socket_timeout=_PING_TIMEOUT_S,
                socket_connect_timeout=_PING_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        try:
            return bool(self._client.ping())
        except RedisError:
            with suppress(RedisError):
                self._client.close()
            self._client = None
            raise
