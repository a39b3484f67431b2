"""The examples as child processes. One that does not end is made to say where it and its server wait."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

TIMEOUT_S = 480.0
REPOSITORY = Path(__file__).parent.parent.parent
STACKS_WITHIN_S = 60.0
SHOWN_BYTES = 6000


def run_example(
    module: str, *arguments: str, is_late: Callable[[], bool] = lambda: False
) -> "subprocess.CompletedProcess[str]":
    """The example's exit status and output. Fails the test after TIMEOUT_S, with all stacks and the ends of all logs.

    The logs are looked for below the argument of --output-dir. It is late also as soon as is_late says so.
    """
    command = [sys.executable, "-m", module, *arguments]
    # Files rather than pipes: what was said is there also when somebody else holds the other end.
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
        )
        try:
            _wait(process, is_late)
        except subprocess.TimeoutExpired:
            _end_with_stacks(process)
            said = f"--- stdout\n{_end_of(out.fileno())}\n--- stderr\n{_end_of(err.fileno())}"
            pytest.fail(f"{' '.join(command)} did not end in time\n{said}\n{_logs(arguments)}")
        except BaseException:
            process.kill()
            raise
        return subprocess.CompletedProcess(
            command, process.returncode, stdout=_text(out.fileno()), stderr=_text(err.fileno())
        )


def _wait(process: "subprocess.Popen[bytes]", is_late: Callable[[], bool]) -> None:
    """Return when it has ended; raises TimeoutExpired when it is late."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
        if is_late() or time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)
        time.sleep(0.05)


def _end_with_stacks(process: "subprocess.Popen[bytes]") -> None:
    """Abort the process and what it started, the last started first; Python writes its stacks to stderr then."""
    family = [*reversed(psutil.Process(process.pid).children(recursive=True)), psutil.Process(process.pid)]
    for member in family:
        with suppress(psutil.Error, OSError):
            resource.prlimit(member.pid, resource.RLIMIT_CORE, (0, 0))
            if "python" in Path(member.exe()).name:
                member.send_signal(signal.SIGABRT)
    psutil.wait_procs(family, timeout=STACKS_WITHIN_S)
    for member in family:
        with suppress(psutil.Error):
            member.kill()
    process.wait(STACKS_WITHIN_S)


def _logs(arguments: Sequence[str]) -> str:
    """The ends of the logs below --output-dir."""
    if "--output-dir" not in arguments:
        return ""
    folder = Path(arguments[list(arguments).index("--output-dir") + 1])
    parts = []
    for log in sorted(folder.rglob("*.log")):
        with log.open("rb") as file:
            parts.append(f"--- {log.relative_to(folder)}\n{_end_of(file.fileno())}")
    return "\n".join(parts)


def _text(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")


def _end_of(file: int) -> str:
    return _text(file)[-SHOWN_BYTES:]
