"""Two ranks give what one rank gives: outputs, losses, gradients and weights."""

from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    DENSE,
    MOE,
    Driver,
    cross_entropy,
    open_engine,
    random_data,
    randomize,
)
from tests.support.ranks import Ranks
from tests.support.relora import adapter_of, merging_driver, train

from gradstream.engine.parallel.comm import Comm
from gradstream.shared.wire import Failed, ForwardBackwardDone, Outcome

pytestmark = pytest.mark.gloo


@dataclass
class Report:
    losses: list[float]
    logprobs: list[np.ndarray]
    grads: list[np.ndarray]
    weights: list[np.ndarray]
    failures: list[str]


def _train(comm: Comm, path: Path) -> Report:
    """Two models of different rank, three batches each with both models' jobs and one bad job, and steps between."""
    driver = Driver(open_engine(path, comm), row_budget_tokens=64)
    report = Report([], [], [], [], [])
    for name, rank in (("a", 4), ("b", 8)):
        driver.create(name, rank=rank)
        randomize(driver, name)
    for step in range(3):
        huge = random_data([6], seed=9)
        huge.weights[0][2] = 3e38
        jobs = [
            ("a", cross_entropy(random_data([30, 7, 50], seed=step))),
            ("b", cross_entropy(huge)),
            ("b", cross_entropy(random_data([12, 12, 3], seed=10 + step))),
        ]
        for outcome in driver.run(*jobs):
            if isinstance(outcome, ForwardBackwardDone):
                report.losses.append(outcome.metrics["loss:sum"])
                report.logprobs.extend(outcome.outputs["logprobs"].arrays())
            else:
                assert isinstance(outcome, Failed)
                report.failures.append(outcome.code)
        report.grads.extend(driver.grad(name).numpy() for name in "ab")
        for name in "ab":
            driver.step(name, learning_rate=1e-3, eps=1e-6)
    report.weights.extend(driver.weights(name).numpy() for name in "ab")
    return report


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_two_ranks_equal_one(path: Path, two_ranks: Ranks) -> None:
    one = _train(Comm.single(), path)
    first, second = two_ranks.run(_train, path)
    assert one.failures == first.failures == ["non_finite"] * 3
    np.testing.assert_allclose(first.losses, one.losses, rtol=1e-4)
    for got, want in zip(first.logprobs, one.logprobs, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
    for got, want in zip(first.grads, one.grads, strict=True):
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)
    for got, want in zip(first.grads[:2], one.grads[:2], strict=True):
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    for ours, theirs in ((first.grads, second.grads), (first.weights, second.weights)):
        for mine, yours in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(mine, yours)


def _merged(comm: Comm) -> Report:
    """A model of four steps that is merged by every second one."""
    driver = merging_driver(comm=comm)
    driver.create("m", rank=4)
    losses = train(driver, range(4))
    adapter = adapter_of(driver)
    assert adapter.num_merges == 2
    return Report(losses, [], [], [adapter.factors.weights.numpy(), adapter.exp_avg.numpy()], [])


def test_merges_are_the_same_on_every_rank(two_ranks: Ranks) -> None:
    one = _merged(Comm.single())
    first, second = two_ranks.run(_merged)
    np.testing.assert_allclose(first.losses, one.losses, rtol=1e-4)
    for mine, yours, alone in zip(first.weights, second.weights, one.weights, strict=True):
        np.testing.assert_array_equal(mine, yours)
        assert np.linalg.norm(mine - alone) < 1e-3 * np.linalg.norm(alone)


def _isolated(comm: Comm, *, together: bool) -> tuple[list[Outcome], np.ndarray]:
    """Outcomes and the sum of the gradients of jobs of every size, in one batch or one after the other."""
    driver = Driver(open_engine(DENSE, comm), row_budget_tokens=64)
    driver.isolate_jobs = True
    driver.create("m")
    randomize(driver, "m")
    jobs = [
        cross_entropy(random_data([9 + 2 * seed, 14, 3 * seed + 1][: 1 + seed % 3], seed=seed)) for seed in range(7)
    ]
    batches = [jobs] if together else [[job] for job in jobs]
    outcomes = [outcome for batch in batches for outcome in driver.run(*(("m", job) for job in batch))]
    return outcomes, driver.grad("m").numpy()


def _isolated_alone(comm: Comm) -> tuple[list[Outcome], np.ndarray]:
    return _isolated(comm, together=False)


def _isolated_together(comm: Comm) -> tuple[list[Outcome], np.ndarray]:
    return _isolated(comm, together=True)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_isolated_jobs_of_a_batch_give_the_bits_that_they_give_alone(
    num_ranks: int, two_ranks: Ranks, tmp_path: Path
) -> None:
    with nullcontext(two_ranks) if num_ranks == 2 else closing(Ranks(num_ranks, tmp_path)) as ranks:
        alone = ranks.run(_isolated_alone)
        together = ranks.run(_isolated_together)
    for (outcomes, grad), (want_outcomes, want_grad) in zip(together, alone, strict=True):
        assert outcomes == want_outcomes
        np.testing.assert_array_equal(grad, want_grad)
        assert grad.any()


def _talk(comm: Comm) -> tuple[bytes, bytes, list[bytes] | None, float]:
    long = comm.broadcast_bytes(b"x" * 100_000 if comm.is_leader else None)
    empty = comm.broadcast_bytes(b"" if comm.is_leader else None)
    gathered = comm.gather_bytes(bytes([comm.rank]) * (3 * comm.rank))
    comm.barrier()
    total = comm.all_reduce_sum_(torch.tensor([1.0 + comm.rank]))
    return long, empty, gathered, float(total)


def test_bytes_reach_every_rank_and_come_back_in_rank_order(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_talk)
    assert first == (b"x" * 100_000, b"", [b"", b"\1\1\1"], 3.0)
    assert second == (b"x" * 100_000, b"", None, 3.0)


def test_a_single_rank_says_the_same_without_a_group() -> None:
    comm = Comm.single()
    assert comm.broadcast_bytes(b"abc") == b"abc"
    assert comm.gather_bytes(b"abc") == [b"abc"]
    assert float(comm.all_reduce_sum_(torch.tensor(2.0))) == 2.0
    assert not torch.distributed.is_initialized()


def _one_datum(comm: Comm) -> float:
    driver = Driver(open_engine(DENSE, comm))
    driver.create("m")
    outcome = driver.done("m", cross_entropy(random_data([5])))
    assert isinstance(outcome, ForwardBackwardDone)
    return outcome.metrics["loss:sum"]


def test_a_rank_without_a_row_still_takes_part(two_ranks: Ranks) -> None:
    first, second = two_ranks.run(_one_datum)
    assert first == second == _one_datum(Comm.single())
