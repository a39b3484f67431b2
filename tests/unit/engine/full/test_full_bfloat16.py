"""Full weights with passes in bfloat16: the optimizer changes float32 weights, or the bfloat16 ones where no copy is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, loss_of, random_data
from tests.support.full import MODEL, Twin, full_driver, full_model, named
from tests.support.oracle import relative_error
from tests.support.snapshots import snapshot

from gradstream.shared.wire import AdamParams, Failed, LoadWeights, OptimizerSpec, OptimStep, SaveWeights


def flat(driver: Driver) -> torch.Tensor:
    return full_model(driver.engine).flat.weights


def trained(driver: Driver, *, steps: int = 3, learning_rate: float = 1e-3) -> list[float]:
    data = random_data([24, 9, 17])
    data.weights = [np.ones_like(weights) for weights in data.weights]
    losses = []
    for _ in range(steps):
        losses.append(loss_of(driver.done(MODEL, cross_entropy(data))))
        driver.step(MODEL, learning_rate=learning_rate)
    return losses


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_the_gradient_is_float32_and_near_the_true_one(path) -> None:
    driver = full_driver(path, dtype="bfloat16")
    data = random_data([24, 9])
    driver.done(MODEL, cross_entropy(data))
    twin = Twin(path)
    twin.loss(data).backward()
    grad = driver.grad(MODEL)
    assert grad.dtype == torch.float32
    for name, parameter in twin.trained().items():
        if "experts" not in name:  # a token near two experts may go to another one than in double precision
            assert relative_error(named(driver, grad)[name], parameter.grad) < (0.05 if path == DENSE else 0.3), name


def test_gradients_are_added_up_in_float32() -> None:
    driver, alone = full_driver(dtype="bfloat16"), full_driver(dtype="bfloat16")
    job = cross_entropy(random_data([24, 9]))
    alone.done(MODEL, job)
    for _ in range(3):
        driver.done(MODEL, job)
    once = alone.grad(MODEL)
    # Row by row into the sum: as near as float32 is, and bfloat16 would not be.
    assert relative_error(driver.grad(MODEL), once + once + once) < 1e-6


def test_passes_compute_with_the_rounded_master_weights_after_every_change() -> None:
    driver = full_driver(dtype="bfloat16")
    first = driver.weights(MODEL)
    assert (flat(driver).dtype, first.dtype) == (torch.bfloat16, torch.float32)
    losses = trained(driver)
    assert losses[-1] < losses[0]
    master = driver.weights(MODEL)
    assert not torch.equal(master, master.bfloat16().float())
    assert torch.equal(flat(driver), master.bfloat16())


def test_updates_too_small_for_bfloat16_add_up_in_the_master_weights() -> None:
    driver = full_driver(dtype="bfloat16")
    first = flat(driver).clone()
    trained(driver, steps=1, learning_rate=1e-6)
    moved_once = int((flat(driver) != first).sum())
    trained(driver, steps=30, learning_rate=1e-6)
    assert int((flat(driver) != first).sum()) > 5 * max(moved_once, 1)


@pytest.mark.parametrize("kind", ["adamw", "anyprecision_adamw"])
def test_without_a_copy_the_passes_weights_are_the_models(kind) -> None:
    driver = full_driver(dtype="bfloat16", master_dtype="bf16", optimizer=OptimizerSpec(type=kind))
    model = full_model(driver.engine)
    assert model.weights is model.flat.weights
    assert model.weights.dtype == torch.bfloat16
    losses = trained(driver, steps=6)
    assert losses[-1] < 0.95 * losses[0]


# Float32 can hold it; rounded to bfloat16 it is inf.
BEYOND = 3.4e38


def test_a_step_whose_weights_are_infinite_once_rounded_is_refused() -> None:
    driver = full_driver(dtype="bfloat16", optimizer=OptimizerSpec(type="sgd"))
    model = full_model(driver.engine)
    model.grad[7] = -1.0
    model.has_grad = True
    before = driver.weights(MODEL)
    step = AdamParams(learning_rate=BEYOND, weight_decay=0.0, grad_clip_norm=0.0)
    (outcome,) = driver.run((MODEL, OptimStep(adam=step)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "non_finite"
    assert torch.equal(driver.weights(MODEL), before)
    assert bool(flat(driver).isfinite().all())


def test_a_checkpoint_with_such_a_weight_is_refused_where_passes_round_and_not_elsewhere(tmp_path: Path) -> None:
    wide, narrow = (full_driver(dtype=dtype, output_dir=tmp_path) for dtype in ("float32", "bfloat16"))
    full_model(wide.engine).weights[7] = BEYOND
    saved = wide.done(MODEL, SaveWeights(name="beyond"))
    load = LoadWeights(path=saved.path, with_optimizer=True)
    before = narrow.weights(MODEL)
    (outcome,) = narrow.run((MODEL, load))
    assert isinstance(outcome, Failed)
    assert "torch.bfloat16 cannot hold" in outcome.message
    assert torch.equal(narrow.weights(MODEL), before)
    wide.done(MODEL, load)


def test_a_snapshot_with_such_a_weight_is_refused(tmp_path: Path) -> None:
    driver = full_driver(dtype="bfloat16")
    full_model(driver.engine).weights[7] = BEYOND
    order = snapshot(driver.engine, tmp_path)
    (outcome,) = driver.run(("x", order))
    assert isinstance(outcome, Failed)
    assert "weights of model default are not finite" in outcome.message
