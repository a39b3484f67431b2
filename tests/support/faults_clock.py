"""Wall clocks that jump: those of a server's processes, not the machine's. See faults_clock.c."""

import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path

import httpx

from tests.support.faults_server import Server

_SOURCE = Path(__file__).with_suffix(".c")
_OFFSETS = struct.Struct("=3q")
_HOUR_NS = 3600 * 10**9


class Whose(Enum):
    """Whose clock; the values are the slots of faults_clock.c. REST: the launcher, the gang and the side processes."""

    QUEUE = 0
    API = 1
    REST = 2


class CannotBuild(Exception):
    """This machine cannot make or load the library that moves clocks; the message says why."""


class Clocks:
    """How far the clocks of a server's processes are from the machine's; `environment` puts a server under them."""

    def __init__(self, folder: Path) -> None:
        """Build the library in folder. Raises CannotBuild."""
        self._offsets_ns = [0, 0, 0]
        self._file = folder / "offsets"
        self._file.write_bytes(_OFFSETS.pack(*self._offsets_ns))
        self.environment: Mapping[str, str] = {
            "LD_PRELOAD": str(_build(folder)),
            "FAULTS_CLOCK": str(self._file),
        }

    def jump(self, hours: float, *, whose: Whose | None = None) -> None:
        """Move one clock, or all, by so many hours from where it stands, in all running processes and those to come."""
        for one in Whose if whose is None else (whose,):
            self._offsets_ns[one.value] += int(hours * _HOUR_NS)
        # In place: the processes have the file mapped.
        with self._file.open("r+b", buffering=0) as file:
            file.write(_OFFSETS.pack(*self._offsets_ns))

    def offset_h(self, whose: Whose) -> float:
        """How far this clock is ahead of the machine's."""
        return self._offsets_ns[whose.value] / _HOUR_NS


def _build(folder: Path) -> Path:
    if not sys.platform.startswith("linux"):
        raise CannotBuild("moving a process's clock takes Linux and glibc")
    compiler = shutil.which("cc")
    if compiler is None:
        raise CannotBuild("moving a process's clock takes a C compiler, and there is no cc")
    library = folder / "faults_clock.so"
    command = [compiler, "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", "-o", str(library), str(_SOURCE)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        raise CannotBuild(f"{_SOURCE.name} does not compile here: {built.stderr.strip()[:400]}")
    return library


def shown_offsets_h(server: Server) -> dict[Whose, float]:
    """How far the clocks of the queue server, the API and rank 0 are ahead of this process's, by what they say themselves."""
    with server.redis() as client:
        seconds, _ = client.time()
    date = httpx.get(f"{server.url}/api/v1/healthz", timeout=30, trust_env=False).headers["date"]
    batch = str(server.events("batch")[-1]["timestamp"])
    shown = {
        Whose.QUEUE: float(seconds),
        Whose.API: parsedate_to_datetime(date).timestamp(),
        Whose.REST: datetime.fromisoformat(batch).timestamp(),
    }
    now = time.time()
    return {whose: (at - now) / 3600 for whose, at in shown.items()}
