"""Messages from rank 0 arrive whole on the other ranks."""

import multiprocessing
from pathlib import Path

import pytest
from tests.support.worker_jobs import job

from gradstream.shared import codec
from gradstream.shared.wire import Batch, Plan
from gradstream.worker.control import Control, Idle, Stop

pytestmark = pytest.mark.gloo


def batch(payloads: list[bytes]) -> Batch:
    jobs = [job("m", seq, "forward_backward", payload=payload) for seq, payload in enumerate(payloads, start=1)]
    plan = Plan(kind="forward_backward", future_ids=[one.future_id for one in jobs], row_budget_tokens=64)
    return Batch(number=7, epoch=3, plan=plan, jobs=jobs)


BATCHES = [batch([b"abc", b"", bytes(range(256)) * 5000]), batch([b""]), batch([])]


def play(rank: int, rendezvous: str, results: "multiprocessing.Queue[bytes | str]") -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    control = Control.open()
    if rank == 0:
        for one in BATCHES:
            control.run(one)
            control.idle()
        control.stop()
    else:
        while True:
            message = control.receive()
            results.put(codec.encode(message) if isinstance(message, Batch) else type(message).__name__)
            if isinstance(message, Stop):
                break
    dist.barrier()
    dist.destroy_process_group()


def test_batches_ticks_and_the_stop_arrive_in_order_with_every_payload_byte(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=play, args=(rank, str(tmp_path / "store"), results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    received = [results.get(timeout=240) for _ in range(2 * len(BATCHES) + 1)]
    for rank in ranks:
        rank.join(timeout=120)
        assert rank.exitcode == 0
    expected = [part for one in BATCHES for part in (codec.encode(one), Idle.__name__)]
    assert received == [*expected, Stop.__name__]


def test_a_gang_of_one_rank_sends_to_nobody():
    control = Control.open()
    assert (control.rank, control.num_ranks) == (0, 1)
    control.run(BATCHES[0])
    control.idle()
    control.stop()
