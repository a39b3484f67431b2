"""Random processes are killed at random instants while clients work, many times on one server."""

import random
import time

import pytest
from tests.faults.conftest import DEFAULT_KILLS, DEFAULT_SEED, SEED_VARIABLE, StartRun
from tests.support.faults_run import Run
from tests.support.faults_server import Role

# No time limit for the whole, which may take a day: every wait in it has a deadline of its own.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(0)]

# How often each role is chosen, by weight: the gang has the state, so it is killed most.
_WEIGHTS = {
    Role.RANK0: 8,
    Role.QUEUE: 4,
    Role.API: 4,
    Role.TORCHRUN: 2,
    Role.LAUNCHER: 1,
    Role.EVERYTHING: 1,
    Role.HOUSEKEEPING: 1,
    Role.EXPORTER: 1,
}
# A kill comes up to this long after the last one was recovered from. About every fourth is not waited for: the next one comes up to
# this long after it, into the recovery itself, as soon as the process that is to be killed runs.
_LONGEST_PAUSE_S = 2.0
_SHORTEST_PAUSE_S = 0.05
# A long run compares the clients' numbers on its way too: a wrong one is found near the kill that it came from.
_KILLS_PER_CHECK = 50


def schedule(seed: int, count: int) -> list[tuple[Role, float, bool]]:
    """Who is killed, how long (s) after the last recovery or kill, and whether the next kill comes without waiting for its recovery."""
    generator = random.Random(seed)
    roles = generator.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()), k=count)
    pauses = [generator.uniform(_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S) for _ in roles]
    return [
        (role, pause, index < count - 1 and generator.random() < 0.25)
        for index, (role, pause) in enumerate(zip(roles, pauses, strict=True))
    ]


def strike(run: Run, role: Role, *, is_interrupted: bool) -> None:
    """Kill, and wait for the recovery unless the next kill is to fall into it."""
    if is_interrupted:
        run.kill_only(role)
    else:
        run.kill(role)


def test_the_schedule_of_make_test_strikes_every_process() -> None:
    """Pass: with the default seed and number, so that no process needs a test of its own there."""
    assert {role for role, _, _ in schedule(DEFAULT_SEED, DEFAULT_KILLS)} == set(_WEIGHTS)


def test_random_kills_change_no_number_and_lose_no_job(
    start_run: StartRun, fault_seed: int, fault_kills: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pass: after every kill the server serves again; at the end every invariant holds, all numbers equal the unharmed run's."""
    plan = schedule(fault_seed, fault_kills)
    run = start_run()
    try:
        for number, (role, pause_s, is_interrupted) in enumerate(plan, start=1):
            time.sleep(pause_s)
            strike(run, role, is_interrupted=is_interrupted)
            if number % 10 == 0:
                with capsys.disabled():
                    rounds = sum(client.round for client in run.workload.clients)
                    print(f"\n{number} kills, {rounds} rounds of the clients, epoch {run.epoch()}", flush=True)
            if number % _KILLS_PER_CHECK == 0:
                run.check_so_far()
        run.verdict(min_rounds=8)
    except BaseException as error:
        error.add_note(
            f"repeat it with --fault-seed {fault_seed} --fault-kills {fault_kills} (or {SEED_VARIABLE}); schedule:"
        )
        error.add_note("\n".join(f"  {role} after {pause_s:.2f} s" for role, pause_s, _ in plan))
        raise
