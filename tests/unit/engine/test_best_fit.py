"""Rows filled by best fit: every datum's results where they belong, and the same gradient."""

from itertools import chain

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    DENSE,
    MOE,
    Driver,
    cross_entropy,
    logprobs_of,
    open_engine,
    random_data,
    randomize,
)
from tests.support.full import MODEL, full_driver
from tests.support.oracle import relative_error

from gradstream.engine.models import base as base_module
from gradstream.engine.packing import Packing, pack

pytestmark = pytest.mark.config_field("sample_packing_strategy")

# Datums that share a row, in best fit, with others that are no neighbours of theirs.
LENGTHS = [50, 60, 50, 40, 7, 90]
OTHERS = [70, 30, 3]
BUDGET = 100


def adapters(path, packing: Packing, *, isolate: bool = False) -> Driver:
    driver = Driver(open_engine(path), row_budget_tokens=BUDGET)
    driver.packing = packing
    driver.isolate_jobs = isolate
    for number, model in enumerate(("a", "b")):
        driver.create(model, seed=number)
        randomize(driver, model, seed=number)
    return driver


@pytest.mark.parametrize("isolate", [False, True], ids=["shared", "isolated"])
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "experts"])
def test_two_adapters_get_the_results_that_they_get_in_order(path, isolate):
    found = []
    for packing in ("sequential", "best_fit"):
        driver = adapters(path, packing, isolate=isolate)
        outcomes = driver.run(
            ("a", cross_entropy(random_data(LENGTHS))), ("b", cross_entropy(random_data(OTHERS, seed=1)))
        )
        found.append(([logprobs_of(outcome) for outcome in outcomes], driver.grad("a"), driver.grad("b")))

    (in_order, *grads), (best, *others) = found
    for one, other in zip(chain(*in_order), chain(*best), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5, rtol=1e-5)
    for one, other in zip(grads, others, strict=True):
        assert relative_error(other, one) < 2e-5


def test_full_weights_get_the_gradient_that_they_get_in_order():
    found = []
    for packing in ("sequential", "best_fit"):
        driver = full_driver(row_budget_tokens=BUDGET)
        driver.packing = packing
        outcome = driver.done(MODEL, cross_entropy(random_data(LENGTHS)))
        found.append((np.concatenate(logprobs_of(outcome)), driver.grad(MODEL)))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=2e-5, rtol=1e-5)
    assert relative_error(found[1][1], found[0][1]) < 2e-5


def test_the_same_plan_gives_the_same_bits():
    grads = []
    for _ in range(2):
        driver = adapters(DENSE, "best_fit")
        driver.done("a", cross_entropy(random_data(LENGTHS)))
        grads.append(driver.grad("a"))
    assert torch.equal(*grads)


def test_the_engine_runs_the_rows_of_its_plan(monkeypatch):
    counts = {}
    packed = base_module.BaseModel.packed
    for packing in ("sequential", "best_fit"):
        rows = []
        monkeypatch.setattr(
            base_module.BaseModel,
            "packed",
            lambda self, lengths, *parents, rows=rows: (rows.append(lengths), packed(self, lengths, *parents))[1],
        )
        driver = adapters(DENSE, packing)
        rows.clear()
        driver.done("a", cross_entropy(random_data(LENGTHS)))
        counts[packing] = rows
        want = pack([LENGTHS], budget_tokens=BUDGET, packing=packing)
        assert rows == [[placement.length for placement in row.placements] for row in want]
    assert len(counts["best_fit"]) < len(counts["sequential"])
