"""Shared prompts on two ranks: the outputs and the gradient of one rank that shares nothing, the same on both."""

import numpy as np
import pytest
from tests.support.engine_builders import DENSE, Driver, cross_entropy, logprobs_of, open_engine, randomize
from tests.support.prompts import prompt_data
from tests.support.ranks import Ranks

from gradstream.engine.packing import Packing
from gradstream.engine.parallel.comm import Comm

pytestmark = [pytest.mark.gloo, pytest.mark.config_field("shared_prompt_tokens")]


def _run(comm: Comm, share: int, packing: Packing, isolate: bool) -> tuple[list[np.ndarray], np.ndarray]:
    driver = Driver(open_engine(DENSE, comm), row_budget_tokens=150)
    driver.shared_prompt_tokens, driver.packing, driver.isolate_jobs = share, packing, isolate
    driver.create("m")
    randomize(driver, "m")
    data = [prompt_data([(30, [9, 5, 9, 2]), (40, [8, 20])], system=12), prompt_data([(60, [3] * 8)], seed=1)]
    outcomes = driver.run(*(("m", cross_entropy(own)) for own in data))
    return [array for outcome in outcomes for array in logprobs_of(outcome)], driver.grad("m").numpy()


@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
def test_two_ranks_equal_one_that_shares_nothing(packing: Packing, isolate: bool, two_ranks: Ranks) -> None:
    want, want_grad = _run(Comm.single(), 0, "sequential", isolate)
    first, second = two_ranks.run(_run, 10, packing, isolate)
    for got, one in zip(first[0], want, strict=True):
        np.testing.assert_allclose(got, one, atol=2e-5, rtol=1e-5)
    assert np.linalg.norm(first[1] - want_grad) < 1e-5 * np.linalg.norm(want_grad)
    np.testing.assert_array_equal(first[1], second[1])
