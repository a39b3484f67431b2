"""What a small tenant waits beside heavy ones, counted in batches: plans alone, without a clock."""

from collections import deque
from dataclasses import dataclass, field

import pytest
from tests.support.worker_jobs import entry, job

from gradstream.shared.wire import Job
from gradstream.worker.backlog import Backlog
from gradstream.worker.plan import Limits, next_turn

LIMITS = Limits(batch_tokens=2048, batch_jobs=64, row_budget_tokens=2048)
NUM_STEPS = 50
IN_FLIGHT = 4


@dataclass(slots=True)
class Server:
    """Runs batches one after another."""

    backlog: Backlog = field(default_factory=lambda: Backlog(cursor="0-0"))
    num_batches: int = 0
    num_sent: int = 0

    def run(self, arriving: list[Job]) -> list[Job]:
        """One batch. These jobs come while it runs."""
        backlog = self.backlog
        turn = next_turn(backlog.waiting, limits=LIMITS, lanes=backlog.lanes, fairness=backlog.fairness)
        jobs = [] if turn is None else backlog.take(turn)
        self.num_batches += 1
        for one in arriving:
            self.num_sent += 1
            backlog.add(entry(self.num_sent, one))
        backlog.settle(jobs)
        return jobs


@dataclass(slots=True)
class Client:
    """Repeats its ops in order, some of them submitted ahead. tokens: of each op."""

    owner: str
    tenant: str
    ops: list[tuple[str, int]]
    ahead: int
    seq: int = 0
    open: deque[str] = field(default_factory=deque)

    def jobs(self) -> list[Job]:
        """What it submits now, given what is open."""
        new = []
        while len(self.open) + len(self.ops) <= self.ahead:
            for op, tokens in self.ops:
                self.seq += 1
                one = job(self.owner, self.seq, op, num_tokens=tokens, tenant=self.tenant)
                self.open.append(one.future_id)
                new.append(one)
        return new

    def see(self, done: list[Job]) -> None:
        for one in done:
            if one.owner == self.owner:
                self.open.remove(one.future_id)


def small_client(number: int = 0, tenant: str = "small") -> Client:
    return Client(f"small{number}", tenant, [("forward_backward", 48), ("optim_step", 0)], ahead=2)


def served(clients: list[Client], *, num_jobs: int) -> list[tuple[int, list[Job]]]:
    """For each job of the first client: how many batches began after it came and before its own, and its own.

    A client answers an outcome while the next batch runs.
    """
    server = Server()
    came_in: dict[str, int] = {}
    found: list[tuple[int, list[Job]]] = []
    arriving: list[Job] = []
    while len(found) < num_jobs:
        came_in.update((one.future_id, server.num_batches + 1) for one in arriving)
        done = server.run(arriving)
        for client in clients:
            client.see(done)
        mine = [one for one in done if one.owner == clients[0].owner]
        found += [(server.num_batches - came_in[one.future_id] - 1, done) for one in mine]
        arriving = [one for client in clients for one in client.jobs()]
    return found


@pytest.mark.parametrize("is_one_tenant", [True, False], ids=["of_one_tenant", "of_tenants_of_their_own"])
@pytest.mark.parametrize(("num_heavy", "tokens"), [(1, 512), (1, 2048), (1, 9000), (2, 1000), (4, 2048), (6, 4096)])
def test_an_op_of_a_small_tenant_waits_for_no_batch_but_the_one_that_runs(num_heavy, tokens, is_one_tenant):
    heavy = [
        Client(name, "small" if is_one_tenant else name, [("forward_backward", tokens)], ahead=IN_FLIGHT)
        for name in (f"heavy{number}" for number in range(num_heavy))
    ]
    waits = served([small_client(), *heavy], num_jobs=2 * NUM_STEPS)
    # A step's ops come together: its forward_backward is the next batch, its optim_step the one after.
    assert [wait for wait, _ in waits] == [0, 1] * NUM_STEPS
    assert all(len(batch) == 1 for _, batch in waits)


def test_several_jobs_of_a_heavy_tenant_fill_half_as_large_a_batch_beside_a_small_one_as_alone():
    heavy = Client("heavy", "heavy", [("forward_backward", 256)], ahead=16)
    alone = served([heavy], num_jobs=100)
    beside = served([Client("heavy", "heavy", heavy.ops, ahead=16), small_client()], num_jobs=100)
    assert max(len(batch) for _, batch in alone) == 8
    assert max(len(batch) for _, batch in beside) == 4


def test_small_tenants_that_train_together_share_their_batches_beside_a_heavy_one():
    small = [small_client(number, tenant=f"small{number}") for number in range(16)]
    heavy = Client("heavy", "heavy", [("forward_backward", 2048)], ahead=IN_FLIGHT)
    for wait, batch in served([*small, heavy], num_jobs=2 * NUM_STEPS):
        assert wait <= 1
        assert len(batch) == 16
