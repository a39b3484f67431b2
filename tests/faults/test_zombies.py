"""Processes that stand still and wake up, and two that want the same place (queue.md section 10, faults 2, 5 and 6)."""

import signal
import time
from pathlib import Path

import pytest
from tests.faults.conftest import Proxied, StartRun
from tests.support.faults_server import READY_S, Role, Server
from tests.support.gang import gang

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def test_a_leader_that_wakes_up_after_its_successor_took_over_is_fenced(start_run: StartRun, tmp_path: Path) -> None:
    """Pass: the sleeper ends without a commit or a snapshot that counts; clients see a pause; every number holds."""
    # The launcher waits for the lease's end before it starts a gang of its own: by then the successor leads, however long it takes.
    run = start_run({"snapshot_replay_budget_s": "0.1", "lease_ttl_s": "120"})
    run.until_answered(count=20)
    sleeper, at_s = run.server.member(Role.RANK0), time.monotonic()
    epoch = run.server.epoch()
    sleeper.send_signal(signal.SIGSTOP)
    settings = run.server.output_dir / "run" / "settings.json"
    with gang(settings, log=tmp_path / "successor.log") as successor:
        run.recovered("SIGSTOP of rank 0, a successor takes over", at_s=at_s)
        assert run.server.epoch() == epoch + 1
        run.until_answered(count=20)
        with run.server.redis() as client:
            pointer = client.hgetall(f"{run.server.keys.prefix}snapshot")
        sleeper.send_signal(signal.SIGCONT)
        run.server.until(lambda: not sleeper.is_running(), what="the sleeper ends")
        assert "fenced" in (run.server.output_dir / "logs" / "gang.log").read_text()
        with run.server.redis() as client:
            later = client.hgetall(f"{run.server.keys.prefix}snapshot")
        assert epoch_of(later) >= epoch_of(pointer)
        # The launcher starts the sleeper's own successor, which belongs to the same launcher and takes over in turn.
        run.server.until(lambda: run.server.epoch() > epoch + 1, what="the launcher's next gang takes over")
        successor.wait(READY_S)
    run.until_answered(count=20)
    ledger = run.verdict(min_rounds=8)
    epochs = [int(batch.batch.partition("-")[0]) for batch in ledger.batches]
    assert epochs == sorted(epochs), "a batch of the sleeper stands behind one of its successor"


def epoch_of(pointer: dict[bytes, bytes]) -> int:
    """The epoch of a snapshot pointer, 0 when there is none."""
    return int(pointer.get(b"epoch", pointer.get(b"batch", b"0")).partition(b"-")[0])


@pytest.mark.slow
def test_a_leader_that_stands_still_is_replaced_by_its_launcher(start_run: StartRun) -> None:
    """Pass: when nobody has led for a while the gang is started again, without help; every number holds."""
    run = start_run({"lease_ttl_s": "3"})
    run.until_answered(count=20)
    epoch, at_s = run.server.epoch(), time.monotonic()
    run.server.member(Role.RANK0).send_signal(signal.SIGSTOP)
    run.server.until(lambda: run.server.epoch() > epoch, what="the gang is replaced")
    run.recovered("SIGSTOP of rank 0", at_s=at_s)
    run.verdict(min_rounds=8)


@pytest.mark.slow
def test_a_peer_that_stands_still_is_noticed_and_the_gang_replaced(start_run: StartRun) -> None:
    """Pass: the watchdog ends the gang within operation_timeout_s (and the time of a start); every number holds."""
    run = start_run({"operation_timeout_s": "5"}, num_ranks=2)
    run.until_answered(count=10)
    epoch, at_s = run.server.epoch(), time.monotonic()
    run.server.member(Role.PEER).send_signal(signal.SIGSTOP)
    run.server.until(lambda: run.server.epoch() > epoch, what="the gang is replaced")
    run.recovered("SIGSTOP of a peer rank", at_s=at_s)
    run.verdict(min_rounds=8)


def test_a_second_launcher_on_the_same_directory_is_refused_and_changes_nothing(start_run: StartRun) -> None:
    """Pass: it ends at once with a sentence; the first one's clients notice nothing."""
    run = start_run()
    run.until_answered(count=10)
    epoch = run.server.epoch()
    second = Server(run.server.output_dir, run.server.overrides)
    second.said = run.server.output_dir.with_name("second.txt")
    second.launch()
    assert second.process.wait(READY_S) == 2
    assert "is in use by another gradstream server" in second.said.read_text()
    assert run.server.epoch() == epoch
    run.verdict()


@pytest.mark.slow
def test_a_second_worker_on_the_same_engine_waits_and_takes_nothing(proxied: Proxied, tmp_path: Path) -> None:
    """Pass: while the first one lives no other launcher's gang gets the epoch; the first one's clients notice nothing."""
    run = proxied.run
    run.until_answered(count=10)
    epoch = run.server.epoch()
    second = Server(tmp_path / "second", run.server.overrides)
    try:
        second.launch()
        log = second.output_dir / "logs" / "gang.log"
        second.until(lambda: log.exists() and "lease_wait" in log.read_text(), what="the second gang waits")
        run.until_answered(count=40)
        assert run.server.epoch() == epoch
    finally:
        second.stop()
    run.verdict(min_rounds=8)
