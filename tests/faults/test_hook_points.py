"""The leader is killed, or a reply is lost, at chosen points of a batch's way (queue.md section 10, faults 1 and 8)."""

import threading
import time
from pathlib import Path

import pytest
from tests.faults.conftest import Proxied, StartRun, cases
from tests.support.faults_proxy import Moment
from tests.support.faults_server import Role, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("moment", cases([Moment.BEFORE, Moment.AFTER]), ids=["not applied", "applied, reply lost"])
@pytest.mark.parametrize("nth", cases([1, 4]))
def test_the_leader_dies_at_its_commit(proxied: Proxied, moment: Moment, nth: int) -> None:
    """Pass: with the batch on disk and not in Redis, and with it in both, every invariant and every number holds."""
    run, proxy = proxied.run, proxied.proxy
    run.until_answered(count=10)
    epoch, leader = run.server.epoch(), run.server.member(Role.RANK0)
    proxy.at_script("commit", moment, leader.kill, nth=nth, cuts=True)
    run.server.until(lambda: proxy.has_called, what="a commit came by")
    at_s = time.monotonic()
    run.server.until(lambda: run.server.epoch() > epoch, what="a new epoch begins")
    run.recovered(f"kill -9 rank 0 at its commit ({moment.name.lower()})", at_s=at_s)
    run.until_answered(count=10)
    run.verdict(min_rounds=8)


@pytest.mark.parametrize("script", cases(["commit", "submit", "lease", "mark_started", "snapshot"]))
def test_a_reply_is_lost_after_the_script_was_applied(proxied: Proxied, script: str) -> None:
    """Pass: whoever called asks again and nothing happens twice; nobody has to be started again."""
    run, proxy = proxied.run, proxied.proxy
    for _ in range(3):
        run.until_answered(count=5)
        proxy.at_script(script, Moment.AFTER, lambda: None, nth=2, cuts=True)
        run.server.until(lambda: proxy.has_called, what=f"script {script} comes by twice", timeout_s=240)
        run.recovered(f"reply of {script} lost", at_s=time.monotonic())
    run.verdict(min_rounds=8)


class Growth(threading.Thread):
    """Kills the leader the moment the log on disk has grown for the nth time."""

    def __init__(self, server: Server, *, nth: int) -> None:
        super().__init__(name="growth", daemon=True)
        self.has_killed = False
        self._directory = server.output_dir / "joblog"
        self._leader = server.member(Role.RANK0)
        self._left = nth

    def run(self) -> None:
        sizes = size_of(self._directory)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            now = size_of(self._directory)
            if now > sizes:
                sizes = now
                self._left -= 1
                if self._left <= 0:
                    self._leader.kill()
                    self.has_killed = True
                    return


def size_of(directory: Path) -> int:
    """Bytes of the newest segment and of those before it."""
    return sum(path.stat().st_size for path in directory.rglob("*.seg"))


@pytest.mark.parametrize("nth", cases([3, 1, 2, 4, 5, 7, 11, 21, 22, 23, 24, 25, 27, 31]))
def test_the_leader_dies_right_after_a_write_to_the_log_on_disk(start_run: StartRun, nth: int) -> None:
    """Pass: whatever frame was written last (a job, a start, a batch), every invariant and every number holds."""
    run = start_run()
    run.until_answered(count=10)
    epoch = run.server.epoch()
    growth = Growth(run.server, nth=nth)
    growth.start()
    growth.join()
    assert growth.has_killed, "the log on disk did not grow"
    at_s = time.monotonic()
    run.server.until(lambda: run.server.epoch() > epoch, what="a new epoch begins")
    run.recovered("kill -9 rank 0 at a write of its log", at_s=at_s)
    run.verdict(min_rounds=8)
