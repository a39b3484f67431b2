"""The disk fills up under a running server, and is freed (queue.md section 10, fault 13)."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.faults.conftest import StartRun, cases
from tests.support.faults_server import Role, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

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


def num_refused(server: Server) -> int:
    """How often somebody said that the log on disk could not be written, or that the queue's server ended, as it does then."""
    return sum(len(server.events(name)) for name in ("joblog_not_written", "redis_unreachable", "queue_server_ended"))


@pytest.mark.parametrize("killed", cases([Role.RANK0, None]), ids=["rank 0 killed meanwhile", "nobody killed"])
def test_a_full_disk_stops_everything_until_there_is_room_again(
    start_run: StartRun, small_disk: Path, tmp_path: Path, killed: Role | None
) -> None:
    """Pass: nothing is acknowledged that is not kept; when there is room, work goes on by itself and every number holds."""
    # The logs of processes lie elsewhere, so that what the gang says of the full disk can be read.
    (tmp_path / "logs").mkdir()
    (small_disk / "out").mkdir()
    (small_disk / "out" / "logs").symlink_to(tmp_path / "logs")
    run = start_run(directory=small_disk)
    run.until_answered(count=20)
    # The clients' next jobs are passes and steps: a save would rightly be refused.
    run.workload.pause()
    filler = fill(small_disk)
    run.workload.resume()
    run.server.until(lambda: num_refused(run.server) > 0, what="the full disk refuses something")
    if killed is not None:
        leader = run.server.member(killed)
        run.kill_only(killed)
        run.server.until(lambda: run.server.member(killed).pid != leader.pid, what="the next gang starts")
    before = num_refused(run.server)
    run.server.until(lambda: num_refused(run.server) > before, what="the full disk refuses something again")
    filler.unlink()
    run.recovered("disk full", at_s=time.monotonic())
    run.verdict(min_rounds=8)


def test_a_launcher_whose_own_output_finds_no_room_serves_all_the_same(tmp_path: Path) -> None:
    """Pass: what cannot be said is dropped; the server is not."""
    server = Server(tmp_path / "out", said=Path("/dev/full"))
    try:
        server.launch_until_ready()
    finally:
        server.stop()
