"""The wall clock jumps, forward and back, under running processes (queue.md section 10, fault 15).

The clocks of the server's processes are moved, those of the clients are not: faults_clock.c. Jumps stay below unread_result_ttl_s, the
longest time that a result waits for its client by the queue server's clock.
"""

import time
from pathlib import Path

import httpx
import pytest
import redis
from tests.faults.conftest import StartRun, cases
from tests.support.faults_clock import CannotBuild, Clocks, Whose, shown_offsets_h
from tests.support.faults_run import Run
from tests.support.faults_server import Role

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

# A server's clocks show their jump to within this: the last batch may be older.
_NEAR_H = 0.1


@pytest.fixture
def clocks(tmp_path: Path) -> Clocks:
    """Clocks that a test can move."""
    folder = tmp_path / "clock"
    folder.mkdir()
    try:
        return Clocks(folder)
    except CannotBuild as error:
        pytest.skip(str(error))


def shows(run: Run, clocks: Clocks) -> bool:
    """True when queue server, API and rank 0 say the time that their clocks were moved to."""
    try:
        shown = shown_offsets_h(run.server)
    except (redis.RedisError, httpx.TransportError):
        return False
    return all(abs(shown[whose] - clocks.offset_h(whose)) < _NEAR_H for whose in Whose)


def jump(run: Run, clocks: Clocks, hours: float, *, whose: Whose | None = None) -> None:
    """Move clocks under load, and wait until all processes work by them and clients are answered."""
    name = "all clocks" if whose is None else f"clock of {whose.name.lower()}"
    fault, at_s = f"{name} {hours:+g} h", time.monotonic()
    run.faults.append(f"{at_s:.1f} {fault}")
    clocks.jump(hours, whose=whose)
    run.server.until(lambda: shows(run, clocks), what=f"every process shows {fault}")
    run.recovered(fault, at_s=at_s)
    run.until_answered(count=20)


@pytest.mark.parametrize("jumps", cases([(3, -8), (-8, 3)]), ids=["forward, then back", "back, then forward"])
def test_all_clocks_jump(start_run: StartRun, clocks: Clocks, jumps: tuple[float, float]) -> None:
    """Pass: nobody is replaced for a jump; a gang that dies after it is replaced as ever; every number holds."""
    run = start_run(environment=clocks.environment)
    run.until_answered(count=20)
    epoch = run.epoch()
    for hours in jumps:
        jump(run, clocks, hours)
    assert run.epoch() == epoch, "the gang was replaced"
    run.kill(Role.RANK0)
    run.until_answered(count=20)
    run.verdict(min_rounds=12)


@pytest.mark.slow
@pytest.mark.parametrize("hours", [3, -8])
@pytest.mark.parametrize("whose", Whose, ids=lambda whose: whose.name.lower())
def test_one_clock_jumps_away_from_the_others(start_run: StartRun, clocks: Clocks, whose: Whose, hours: float) -> None:
    """Pass: so do machines whose clocks disagree; nobody is replaced; all of them start again at their times; every number holds."""
    run = start_run(environment=clocks.environment)
    run.until_answered(count=20)
    epoch = run.epoch()
    jump(run, clocks, hours, whose=whose)
    assert run.epoch() == epoch, "the gang was replaced"
    run.kill(Role.EVERYTHING)
    run.until_answered(count=20)
    jump(run, clocks, -hours, whose=whose)
    run.verdict(min_rounds=12)
