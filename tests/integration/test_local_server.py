"""The examples' server process: gone with whoever started it, also when that was killed."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parent.parent.parent
CALLER = """
import sys, time
from pathlib import Path
from examples.local_server import local_server
with local_server(Path("configs/tiny.yaml"), output_dir=Path(sys.argv[1])):
    pass
"""


def serving(folder: Path) -> list[psutil.Process]:
    """The processes that have folder among their arguments, the caller itself left out."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words) and CALLER not in words:
            found.append(process)
    return found


@pytest.mark.e2e
def test_a_killed_caller_takes_its_server_along(tmp_path: Path) -> None:
    folder = tmp_path / "outputs"
    caller = subprocess.Popen([sys.executable, "-c", CALLER, str(folder)], cwd=REPOSITORY)
    try:
        deadline = time.monotonic() + 180
        while not serving(folder):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        caller.kill()
        caller.wait()
    deadline = time.monotonic() + 180
    while left := serving(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
