"""A gang that starts on a full disk waits for room, as one does that runs."""

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.gang import Client, gang, settings_file
from tests.support.polling import wait_until

from gradstream.shared.joblog.redis_intake import RedisIntake
from gradstream.shared.wire import Failed

_DISK_BYTES = 8 * 1024**2


@pytest.fixture
async def client(redis_url: str, engine_name: str) -> AsyncIterator[Client]:
    async with RedisIntake(redis_url, engine=engine_name) as intake:
        yield Client(intake)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own without room, mounted where the server writes; `filler` takes all of it."""
    disk = tmp_path / "out"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (subprocess.CalledProcessError, FileNotFoundError):
        pytest.skip("mounting a small file system takes root")
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_it_says_so_and_serves_when_there_is_room(client, full_disk, tmp_path, redis_url, engine_name):
    settings, log = settings_file(tmp_path, redis_url=redis_url, engine=engine_name), tmp_path / "gang.log"
    with gang(settings, log=log, leads=False) as process:
        wait_until(
            lambda: log.exists() and log.read_text().count("joblog_not_written") > 1,
            evidence=lambda: log.read_text()[-3000:],
        )
        assert process.poll() is None
        assert "the disk is full" in log.read_text()
        (full_disk / "filler").unlink()
        _, created = await client.create()
        assert not isinstance(await client.outcome(created), Failed)
    assert "rank_failed" not in log.read_text()


def test_it_ends_in_order_when_it_is_asked_to_stop_meanwhile(full_disk, tmp_path, redis_url, engine_name):
    settings, log = settings_file(tmp_path, redis_url=redis_url, engine=engine_name), tmp_path / "gang.log"
    with gang(settings, log=log, leads=False) as process:
        wait_until(
            lambda: log.exists() and "joblog_not_written" in log.read_text(), evidence=lambda: log.read_text()[-3000:]
        )
        process.terminate()
        assert process.wait(120) == 0
    assert full_disk.joinpath("filler").exists()
