"""Files and keys are damaged or lost (queue.md section 10, faults 4, 17 and 18).

The clients stand still while the damage is done, so that what they rely on has been read by the gang: a job that only the queue
server has is lost with it (docs/durability.md).
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults.conftest import StartRun
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

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]


def damaged_while_dead(run: Run, fault: str, damage: Callable[[Server], None]) -> None:
    """Let the clients stand, crash everything, do the damage, start again, and wait until clients are answered."""
    run.until_answered(count=40)
    run.workload.pause()
    run.server.crash()
    damage(run.server)
    at_s = time.monotonic()
    run.server.launch()
    run.server.until(run.server.is_serving, what=f"it serves again after {fault}")
    run.workload.resume()
    run.recovered(fault, at_s=at_s)


@pytest.mark.parametrize("num_bytes", [1, 100, 5_000, 100_000])
def test_the_queue_servers_file_lost_its_tail(start_run: StartRun, num_bytes: int) -> None:
    """Pass: what the tail held is restored from the log on disk; every invariant and every number holds."""
    run = start_run()
    damaged_while_dead(run, "AOF tail cut", lambda server: cut_tail(append_files(server)[-1], num_bytes))
    run.verdict(min_rounds=12)


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


@pytest.mark.parametrize("at", [0.01, 0.5, 0.99])
def test_a_bit_flips_in_the_newest_snapshot(start_run: StartRun, at: float) -> None:
    """Pass: it is told from a whole one, an older one is used, the replay is longer; every number holds."""
    run = start_run({"snapshot_replay_budget_s": "0.2"})

    def damage(server: Server) -> None:
        newest = cuts(server)[-1]
        for file in snapshot_files(server, newest):
            if newest.stem.lstrip("0") in file.parent.name or file.parent.parent.name in newest.stem:
                flip_bit(file, at)
        flip_bit(snapshot_files(server, newest)[-1], at)

    damaged_while_dead(run, "bit flip in a snapshot", damage)
    run.verdict(min_rounds=12)


def test_the_newest_snapshots_manifest_is_torn(start_run: StartRun) -> None:
    """Pass: the one before is used; every number holds."""
    run = start_run({"snapshot_replay_budget_s": "0.2"})
    damaged_while_dead(run, "torn snapshot manifest", lambda server: cut_tail(cuts(server)[-1], 40))
    run.verdict(min_rounds=12)


@pytest.mark.parametrize("num_bytes", [1, 50])
def test_the_log_on_disk_lost_its_tail(start_run: StartRun, num_bytes: int) -> None:
    """Pass (a power cut): either every number holds, or the models are lost with a message that names the log. Never wrong numbers."""
    run = start_run()
    damaged_while_dead_and_honest(run, "segment tail cut", lambda server: cut_tail(segments(server)[-1], num_bytes))


def test_a_bit_flips_in_the_middle_of_the_log_on_disk(start_run: StartRun) -> None:
    """Pass: noticed by its checksum; training goes on exactly or not at all."""
    run = start_run({"snapshot_replay_budget_s": "600", "snapshot_idle_s": "600"})
    damaged_while_dead_and_honest(run, "bit flip in a segment", lambda server: flip_bit(segments(server)[-1], 0.5))


def damaged_while_dead_and_honest(run: Run, fault: str, damage: Callable[[Server], None]) -> None:
    """Like damaged_while_dead with a verdict; instead of going on, the server may refuse to, naming the log or the loss."""
    refusal = ""
    try:
        damaged_while_dead(run, fault, damage)
        run.verdict(min_rounds=12)
    except AssertionError as error:
        refusal = str(error)
    if refusal:
        said = run.server.evidence(200)
        assert not run.differences(), f"numbers differ: {refusal}"
        assert "is lost" in said or "damaged" in said, f"nobody said why it does not go on: {refusal}"


def emptied(run: Run) -> float:
    """Empty the queue server while the clients stand; when that was."""
    run.until_answered(count=40)
    run.workload.pause()
    with run.server.redis() as client:
        client.flushall()
    return time.monotonic()


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


@pytest.mark.parametrize("name", ["epoch", "lease", "cursor", "journal", "stat", "card"])
def test_an_operator_deletes_a_key(start_run: StartRun, name: str) -> None:
    """Pass: noticed or harmless, and never a wrong number or a job that runs twice."""
    run = start_run()
    run.until_answered(count=40)
    run.workload.pause()
    at_s = time.monotonic()
    with run.server.redis() as client:
        assert client.delete(f"{run.server.keys.prefix}{name}") in (0, 1)
    run.workload.resume()
    run.recovered(f"DEL {name}", at_s=at_s)
    run.verdict(min_rounds=12)
