"""Files and keys are damaged or lost (queue.md section 10, faults 4, 17 and 18).

The clients stand still while the damage is done, so that what they rely on has been read by the gang: a job that only the queue
server has is lost with it (docs/durability.md).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.conftest import StartRun, cases
from tests.support.faults_damage import (
    append_files,
    copy_queue,
    cut_tail,
    cuts,
    flip_bit,
    put_back_queue,
    segments,
    snapshot_files,
)
from tests.support.faults_run import Run
from tests.support.faults_server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


def damaged_at_rest(run: Run, fault: str, damage: Callable[[Server], None]) -> float:
    """Let the clients stand, crash everything, do the damage, start again, and wait until it serves; when the start was."""
    run.until_answered(count=40)
    run.workload.pause()
    run.server.crash()
    damage(run.server)
    at_s = time.monotonic()
    run.server.launch()
    run.server.until(run.server.is_serving, what=f"it serves again after {fault}")
    return at_s


def damaged_while_dead(run: Run, fault: str, damage: Callable[[Server], None]) -> None:
    """Like damaged_at_rest; then let the clients go on, and wait until they are answered."""
    at_s = damaged_at_rest(run, fault, damage)
    run.workload.resume()
    run.recovered(fault, at_s=at_s)


@pytest.mark.parametrize("num_bytes", cases([5_000, 1, 100, 100_000]))
def test_the_queue_servers_file_lost_its_tail(start_run: StartRun, num_bytes: int) -> None:
    """Pass: what the tail held is restored from the log on disk; every invariant and every number holds."""
    run = start_run()
    damaged_while_dead(run, "AOF tail cut", lambda server: cut_tail(append_files(server)[-1], num_bytes))
    run.verdict(min_rounds=12)


@pytest.mark.slow
def test_the_queue_servers_data_is_gone(start_run: StartRun) -> None:
    """Pass: the models come back from the log on disk; every number holds."""
    run = start_run()
    damaged_while_dead(run, "data of the queue server lost", lambda server: shutil.rmtree(server.output_dir / "redis"))
    run.verdict(min_rounds=12)


def test_the_queue_servers_data_is_an_older_copy(start_run: StartRun, tmp_path: Path) -> None:
    """Pass (a failover to a replica that lost its tail): noticed, and fed again from the log on disk; every number holds."""
    run = start_run()
    run.until_answered(count=20)
    run.workload.pause()
    run.server.crash()
    copy_queue(run.server, tmp_path / "replica")
    run.server.launch()
    run.server.until(run.server.is_serving, what="it serves again")
    run.workload.resume()
    damaged_while_dead(run, "failover that lost the tail", lambda server: put_back_queue(server, tmp_path / "replica"))
    run.verdict(min_rounds=16)


@pytest.mark.parametrize("at", cases([0.5, 0.01, 0.99]))
def test_a_bit_flips_in_the_newest_snapshot(start_run: StartRun, at: float) -> None:
    """Pass: it is told from a whole one, an older one is used, the replay is longer; every number holds."""
    run = start_run({"snapshot_replay_budget_s": "0.2"})
    damaged = []

    def damage(server: Server) -> None:
        newest = cuts(server)[-1]
        # Those that it wrote itself: the others are also those of the cut before.
        files = [file for file in snapshot_files(server, newest) if file.parent.name == newest.stem]
        assert files, f"{newest} wrote no model"
        for file in files:
            flip_bit(file, at)
        damaged.append(newest.stem)

    until_there_are_two_cuts(run)
    damaged_while_dead(run, "bit flip in a snapshot", damage)
    assert damaged[0] in [event["snapshot"] for event in run.server.events("snapshot_damaged")]
    assert_older_was_used(run.server, damaged[0])
    run.verdict(min_rounds=12)


def until_there_are_two_cuts(run: Run) -> None:
    """Return when one can be damaged and an older one is there, whatever time the work takes that makes them due."""
    run.server.until(lambda: len(cuts(run.server)) >= 2, what="two snapshots are there")


def assert_older_was_used(server: Server, damaged: str) -> None:
    """The first gang behind the last crash took over from a snapshot before the damaged one."""
    used = server.events("took_over")[-1]["snapshot"]
    assert isinstance(used, str), "it took over from no snapshot"
    assert used < damaged


@pytest.mark.slow
def test_the_newest_snapshots_manifest_is_torn(start_run: StartRun) -> None:
    """Pass: the one before is used; every number holds."""
    run = start_run({"snapshot_replay_budget_s": "0.2"})
    torn = []

    def damage(server: Server) -> None:
        torn.append(cuts(server)[-1])
        cut_tail(torn[0], 40)

    until_there_are_two_cuts(run)
    damaged_while_dead(run, "torn snapshot manifest", damage)
    assert any(str(torn[0]) in str(event["reason"]) for event in run.server.events("snapshot_unreadable"))
    assert_older_was_used(run.server, torn[0].stem)
    run.verdict(min_rounds=12)


@pytest.mark.parametrize("num_bytes", cases([50, 1]))
def test_the_log_on_disk_lost_its_tail(start_run: StartRun, num_bytes: int) -> None:
    """Pass (a power cut): either every number holds, or the models are lost with a message that names the log. Never wrong numbers."""
    run = start_run()
    damaged_while_dead_and_honest(run, "segment tail cut", lambda server: cut_tail(segments(server)[-1], num_bytes))


@pytest.mark.slow
def test_a_bit_flips_in_the_middle_of_the_log_on_disk(start_run: StartRun) -> None:
    """Pass: its checksum tells when that has to be read; training goes on exactly or not at all."""
    run = start_run({"snapshot_replay_budget_s": "600", "snapshot_idle_s": "600"})
    damaged_while_dead_and_honest(run, "bit flip in a segment", lambda server: flip_bit(segments(server)[-1], 0.5))


def damaged_while_dead_and_honest(run: Run, fault: str, damage: Callable[[Server], None]) -> None:
    """Like damaged_while_dead with a verdict; instead of going on, models may be lost, with a reason on their records."""
    at_s = damaged_at_rest(run, fault, damage)
    lost = run.lost_models()
    if lost:
        assert all("the log on disk" in reason for reason in lost.values()), lost
        run.verdict_of_a_loss(lost)
    else:
        run.workload.resume()
        run.recovered(fault, at_s=at_s)
        run.verdict(min_rounds=12)


def emptied(run: Run) -> float:
    """Empty the queue server while the clients stand; when that was."""
    run.until_answered(count=40)
    run.workload.pause()
    with run.server.redis() as client:
        client.flushall()
    return time.monotonic()


@pytest.mark.slow
def test_an_operator_empties_the_queue_server(start_run: StartRun) -> None:
    """Pass: FLUSHALL stops the gang with a reason; the next one restores everything that it had read; every number holds."""
    run = start_run()
    at_s = emptied(run)
    run.server.until(lambda: run.epoch() > 1, what="a gang of a new epoch, above those on disk, takes over")
    run.server.until(run.server.is_serving, what="it serves again")
    run.workload.resume()
    run.recovered("FLUSHALL, clients at rest", at_s=at_s)
    run.verdict(min_rounds=12)


def test_an_operator_empties_the_queue_server_under_load(start_run: StartRun) -> None:
    """Pass: the same while clients ask; none is told that its model does not exist."""
    run = start_run()
    at_s = emptied(run)
    run.workload.resume()
    run.server.until(lambda: run.epoch() > 1, what="a gang of a new epoch, above those on disk, takes over")
    run.recovered("FLUSHALL under load", at_s=at_s)
    run.verdict(min_rounds=12)


@pytest.mark.parametrize("name", cases(["epoch", "lease", "cursor", "journal", "stat", "card"]))
def test_an_operator_deletes_a_key(start_run: StartRun, name: str) -> None:
    """Pass: noticed or harmless, and never a wrong number or a job that runs twice."""
    run = start_run()
    run.until_answered(count=40)
    run.workload.pause()
    at_s = time.monotonic()
    with run.server.redis() as client:
        assert client.delete(f"{run.server.keys.prefix}{name}") == 1, f"there is no key {name}"
    run.workload.resume()
    run.recovered(f"DEL {name}", at_s=at_s)
    run.verdict(min_rounds=12)
