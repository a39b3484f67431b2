"""Settings of the embedded server, and the configuration file made from them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Durability = Literal["always", "everysec", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedConfig:
    """One embedded server.

    data_dir: everything it writes; made when missing. durability: `always` syncs before every acknowledgement, `everysec` may lose
    the last second when the machine (not the process) dies, `none` keeps nothing across restarts. max_memory_bytes None: a
    quarter of the machine's. port None: a Unix socket that only this user can open; else a loopback port with a
    password that is kept in data_dir.
    """

    data_dir: Path
    durability: Durability = "always"
    max_memory_bytes: int | None = None
    binary: Path | None = None
    port: int | None = None
    start_timeout_s: float = 30.0
    # While it reads its log back after a restart, it answers LOADING.
    load_timeout_s: float = 600.0
    stop_timeout_s: float = 15.0

    @property
    def memory_limit_bytes(self) -> int:
        """The limit that is given to the server."""
        if self.max_memory_bytes is not None:
            return self.max_memory_bytes
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def config_text(config: EmbeddedConfig, *, socket: Path | None, password: str | None, log_file: Path) -> str:
    """The server's configuration file."""
    lines = [
        f"dir {_quoted(config.data_dir.resolve())}",
        f"logfile {_quoted(log_file)}",
        "daemonize no",
        'save ""',
        f"appendonly {'no' if config.durability == 'none' else 'yes'}",
        f"appendfsync {'always' if config.durability == 'always' else 'everysec'}",
        "auto-aof-rewrite-percentage 100",
        "auto-aof-rewrite-min-size 256mb",
        "aof-timestamp-enabled yes",
        f"maxmemory {config.memory_limit_bytes}",
        "maxmemory-policy noeviction",
        "stop-writes-on-bgsave-error no",
        "timeout 0",
        "tcp-keepalive 30",
        "client-output-buffer-limit normal 1gb 256mb 60",
        "latency-monitor-threshold 20",
        "enable-debug-command no",
    ]
    if socket is not None:
        lines += ["port 0", f"unixsocket {_quoted(socket)}", "unixsocketperm 700"]
    else:
        assert password is not None
        lines += [f"port {config.port}", "bind 127.0.0.1", f"requirepass {password}"]
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'
