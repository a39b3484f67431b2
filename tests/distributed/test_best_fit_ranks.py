"""Rows filled by best fit on two ranks: the outputs and the gradient of one rank, the same on both."""

import numpy as np
import pytest
from tests.support.engine_builders import DENSE, Driver, cross_entropy, logprobs_of, open_engine, random_data, randomize
from tests.support.ranks import Ranks

from gradstream.engine.packing import Packing
from gradstream.engine.parallel.comm import Comm

pytestmark = [pytest.mark.gloo, pytest.mark.config_field("sample_packing_strategy")]


def _run(comm: Comm, packing: Packing, isolate: bool) -> tuple[list[np.ndarray], np.ndarray]:
    driver = Driver(open_engine(DENSE, comm), row_budget_tokens=64)
    driver.packing = packing
    driver.isolate_jobs = isolate
    driver.create("m")
    randomize(driver, "m")
    jobs = [cross_entropy(random_data(lengths, seed=len(lengths))) for lengths in ([40, 20, 30, 3, 61, 5], [30, 9])]
    outcomes = driver.run(*(("m", job) for job in jobs))
    return [array for outcome in outcomes for array in logprobs_of(outcome)], driver.grad("m").numpy()


@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
def test_two_ranks_equal_one_in_order(isolate: bool, two_ranks: Ranks) -> None:
    want, want_grad = _run(Comm.single(), "sequential", isolate)
    first, second = two_ranks.run(_run, "best_fit", isolate)
    for got, one in zip(first[0], want, strict=True):
        np.testing.assert_allclose(got, one, atol=2e-5, rtol=1e-5)
    assert np.linalg.norm(first[1] - want_grad) < 1e-5 * np.linalg.norm(want_grad)
    np.testing.assert_array_equal(first[1], second[1])
