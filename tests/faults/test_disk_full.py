"""The disk fills up under a running server, and is freed (queue.md section 10, fault 13)."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.faults.conftest import StartRun
from tests.support.faults_server import Role, Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

_DISK_BYTES = 96 * 1024**2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)], check=True, capture_output=True
        )
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes what is left."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


@pytest.mark.parametrize("killed", [None, Role.RANK0], ids=["nobody killed", "rank 0 killed meanwhile"])
def test_a_full_disk_stops_everything_until_there_is_room_again(
    start_run: StartRun, small_disk: Path, killed: Role | None
) -> None:
    """Pass: nothing is acknowledged that is not kept; when there is room, work goes on by itself and every number holds."""
    run = start_run(directory=small_disk)
    run.until_answered(count=20)
    # The clients' next jobs are passes and steps: a save would rightly be refused.
    run.workload.pause()
    filler = fill(small_disk)
    run.workload.resume()
    time.sleep(3)
    if killed is not None:
        run.kill_only(killed)
    time.sleep(5)
    filler.unlink()
    run.recovered("disk full for 8 s", at_s=time.monotonic())
    run.verdict(min_rounds=8)


def test_a_launcher_whose_own_output_finds_no_room_serves_all_the_same(tmp_path: Path) -> None:
    """Pass: what cannot be said is dropped; the server is not."""
    server = Server(tmp_path / "out", said=Path("/dev/full"))
    try:
        server.launch_until_ready()
    finally:
        server.stop()
