"""A job that kills every gang that runs it (queue.md section 10, fault 14)."""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
import tinker
from tests.faults.conftest import StartRun
from tests.support.faults_client import API_KEY, BASE_MODEL
from tests.support.faults_server import Role, Server
from tinker import types

from gradstream.worker.disklog.frames import Frame, LoggedBatch, Position, Started
from gradstream.worker.disklog.log import DiskLog

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]


class Assassin(threading.Thread):
    """Kills the leader whenever the log on disk says that it runs the marked job."""

    def __init__(self, server: Server, future_id: str) -> None:
        super().__init__(name="assassin", daemon=True)
        self.num_kills = 0
        self.is_over = threading.Event()
        self._server = server
        self._future_id = future_id

    def run(self) -> None:
        for frame in self._frames():
            if isinstance(frame, Started) and self._future_id in frame.future_ids:
                with suppress(psutil.NoSuchProcess):
                    self._server.member(Role.RANK0).kill()
                self.num_kills += 1
            if isinstance(frame, LoggedBatch) and any(
                outcome.future_id == self._future_id for outcome in frame.outcomes
            ):
                return

    def _frames(self) -> Iterator[Frame]:
        """Each frame of the log once, as soon as it is there, until it is over."""
        log = DiskLog(self._server.output_dir / "joblog" / "main")
        last: Position | None = None
        while not self.is_over.is_set():
            with suppress(OSError, ValueError):
                for position, frame in log.scan(last):
                    if position != last:
                        yield frame
                    last = position
            time.sleep(0.01)


def datum(num_tokens: int, *, seed: int = 0) -> types.Datum:
    """Random tokens, so that no two seeds have a beginning in common that the engine would compute once."""
    tokens = random.Random(seed).choices(range(3, 193), k=num_tokens + 1)
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * num_tokens},
    )


def test_a_poisoned_job_is_set_aside_after_two_deaths_and_the_others_go_on(start_run: StartRun) -> None:
    """Pass: its client gets an error that says so, its model trains on as if the job had not been, all others are exact."""
    run = start_run()
    run.until_answered(count=10)
    service = tinker.ServiceClient(base_url=run.server.url, api_key=API_KEY)
    training = service.create_lora_training_client(base_model=BASE_MODEL, rank=4, seed=1)
    # Long enough to be caught in the act: seconds of work.
    future_id = f"{training.model_id}:1"
    assassin = Assassin(run.server, future_id)
    assassin.start()
    at_s = time.monotonic()
    try:
        poisoned = training.forward_backward([datum(500, seed=seed) for seed in range(200)], "cross_entropy")
        with pytest.raises(tinker.RequestFailedError, match="set aside"):
            poisoned.result(timeout=240)
    finally:
        assassin.is_over.set()
        assassin.join(10)
    assert assassin.num_kills == 2
    run.recovered("poisoned job, two deaths", at_s=at_s)
    step = training.optim_step(types.AdamParams(learning_rate=1e-3)).result(timeout=240)
    assert (step.metrics or {})["grad_norm"] == 0.0
    service.holder.close()
    run.verdict(min_rounds=8)


def reserve_scratch(server: Server) -> None:
    """Have the leader run a pass larger than any of the clients'.

    MKL keeps a thread's scratch buffer once it has one. When it gets none it says nothing and multiplies another way, with other last
    bits (docs/durability.md): what this test is not about.
    """
    service = tinker.ServiceClient(base_url=server.url, api_key=API_KEY)
    try:
        training = service.create_lora_training_client(base_model=BASE_MODEL, rank=32, seed=1)
        training.forward_backward([datum(500, seed=seed) for seed in range(8)], "cross_entropy").result(timeout=240)
    finally:
        service.holder.close()


@pytest.mark.slow
def test_a_gang_whose_memory_runs_out_comes_back(start_run: StartRun) -> None:
    """Pass: a limit on the leader's memory ends it in the middle of its work; the next one goes on; every number holds."""
    run = start_run()
    reserve_scratch(run.server)
    run.until_answered(count=20)
    epoch, leader = run.server.epoch(), run.server.member(Role.RANK0)
    at_s = time.monotonic()
    leader.rlimit(psutil.RLIMIT_AS, (leader.memory_info().vms, leader.memory_info().vms))
    deadline = time.monotonic() + 30
    while leader.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    # If it lives on what it has: the kernel's own way then.
    with suppress(psutil.NoSuchProcess):
        leader.kill()
    run.server.until(lambda: run.server.epoch() > epoch, what="a new epoch begins")
    run.recovered("rank 0 out of memory", at_s=at_s)
    run.verdict(min_rounds=8)
