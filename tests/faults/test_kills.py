"""Every process of a server is killed once while clients work (queue.md section 10, faults 1, 2, 3, 10 and 20)."""

import pytest
from tests.faults.conftest import StartRun, cases
from tests.support.faults_server import Role

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


@pytest.mark.slow
def test_without_any_fault_two_runs_agree_bit_for_bit(start_run: StartRun) -> None:
    """The harness itself: what it calls different must not be its own noise."""
    run = start_run()
    run.until_answered(count=40)
    run.verdict(min_rounds=12)


# The random kills of make test strike each of them too.
@pytest.mark.slow
@pytest.mark.parametrize(
    "role",
    [Role.API, Role.HOUSEKEEPING, Role.EXPORTER, Role.QUEUE, Role.RANK0, Role.TORCHRUN, Role.LAUNCHER, Role.EVERYTHING],
)
def test_clients_see_only_a_pause_when_it_is_killed(start_run: StartRun, role: Role) -> None:
    """Pass: every invariant, twice in a row, the numbers equal to the unharmed run's bit for bit."""
    run = start_run()
    for _ in range(2):
        run.until_answered(count=20)
        run.kill(role)
    run.until_answered(count=20)
    run.verdict(min_rounds=12)


@pytest.mark.parametrize("role", cases([Role.PEER, Role.RANK0]))
def test_clients_of_two_ranks_see_only_a_pause_when_one_is_killed(start_run: StartRun, role: Role) -> None:
    """Pass: the gang is replaced as a whole; every invariant; the numbers equal to an unharmed run's with two ranks."""
    run = start_run(num_ranks=2)
    run.until_answered(count=20)
    run.kill(role)
    run.until_answered(count=20)
    run.verdict(min_rounds=8)


@pytest.mark.parametrize("durability", cases(["everysec", "always"]))
def test_the_queue_server_is_killed_while_it_rewrites_its_file(start_run: StartRun, durability: str) -> None:
    """Pass: a kill -9 loses nothing that was acknowledged, with either durability (only a power cut tells them apart)."""
    run = start_run({"durability": durability})
    for _ in range(3):
        run.until_answered(count=20)
        with run.server.redis() as client:
            client.bgrewriteaof()
        run.kill(Role.QUEUE)
    run.verdict(min_rounds=12)
