"""The update of a flat adapter against torch.optim.AdamW."""

import pytest
import torch
from tests.support.engine_builders import Driver, open_engine

from gradstream.engine.adapters.adapter import Adapter
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import AdamParams, Failed, OptimStep, OptimStepDone


@pytest.fixture
def driver() -> Driver:
    driver = Driver(open_engine())
    driver.create("m", rank=4)
    return driver


def _adapter(driver: Driver) -> Adapter:
    return driver.engine.state.models[ModelId("m")]


def _fill_grad(adapter: Adapter, seed: int, scale: float = 1.0) -> torch.Tensor:
    grad = torch.randn(adapter.grad.shape, generator=torch.Generator().manual_seed(seed)) * scale
    adapter.grad.copy_(grad)
    adapter.has_grad = True
    return grad


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6], ids=["off", "clips", "above the norm"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_ten_steps_equal_torch_adamw(driver: Driver, decay: float, clip: float) -> None:
    adapter = _adapter(driver)
    parameter = torch.nn.Parameter(adapter.weights.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=False)
    for step in range(10):
        lr, betas, eps = 0.01 * (step + 1), (0.8 + 0.01 * step, 0.95), 1e-8
        grad = _fill_grad(adapter, step)
        parameter.grad = grad.clone()
        norm = float(grad.double().norm())
        if clip:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        optimizer.param_groups[0].update(lr=lr, betas=betas, eps=eps, weight_decay=decay)
        optimizer.step()
        outcome = driver.step(
            "m",
            learning_rate=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=decay,
            grad_clip_norm=clip,
        )
        assert isinstance(outcome, OptimStepDone)
        assert outcome.metrics == {"grad_norm": pytest.approx(norm, rel=1e-6), "lr": lr, "step": step + 1}
        torch.testing.assert_close(adapter.weights, parameter.detach(), rtol=2e-6, atol=2e-7)
    state = optimizer.state[parameter]
    torch.testing.assert_close(adapter.exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(adapter.exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-7)


def test_a_step_clears_the_gradient(driver: Driver) -> None:
    adapter = _adapter(driver)
    _fill_grad(adapter, 0)
    driver.step("m")
    assert not adapter.grad.any()
    assert not adapter.has_grad


def test_a_step_without_a_gradient_decays_the_moments_and_reports_norm_zero(driver: Driver) -> None:
    adapter = _adapter(driver)
    _fill_grad(adapter, 0)
    driver.step("m", learning_rate=0.01, beta1=0.9)
    moment = adapter.exp_avg.clone()
    weights = adapter.weights.clone()
    outcome = driver.step("m", learning_rate=0.01, beta1=0.9)
    assert isinstance(outcome, OptimStepDone)
    assert outcome.metrics["grad_norm"] == 0.0
    assert outcome.metrics["step"] == 2
    torch.testing.assert_close(adapter.exp_avg, moment * 0.9)
    assert not torch.equal(adapter.weights, weights)


BAD = {
    "negative rate": AdamParams(learning_rate=-1.0),
    "nan rate": AdamParams(learning_rate=float("nan")),
    "beta1 of one": AdamParams(beta1=1.0),
    "negative beta2": AdamParams(beta2=-0.1),
    "inf eps": AdamParams(eps=float("inf")),
    "negative clip": AdamParams(grad_clip_norm=-1.0),
    "nan decay": AdamParams(weight_decay=float("nan")),
}


@pytest.mark.parametrize("adam", BAD.values(), ids=BAD.keys())
def test_bad_hyper_parameters_are_refused_and_the_gradient_stays(driver: Driver, adam: AdamParams) -> None:
    adapter = _adapter(driver)
    grad = _fill_grad(adapter, 0)
    weights = adapter.weights.clone()
    (outcome,) = driver.run(("m", OptimStep(adam=adam)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "invalid_request"
    assert "adam_params." in outcome.message
    assert torch.equal(adapter.grad, grad)
    assert torch.equal(adapter.weights, weights)
    assert adapter.step == 0


OVERFLOWS = {
    "weights": (1.0, AdamParams(learning_rate=3e38, weight_decay=3e38)),
    "zero over zero": (0.0, AdamParams(eps=0.0)),
    "second moment": (1e25, AdamParams()),
}


@pytest.mark.parametrize(("scale", "adam"), OVERFLOWS.values(), ids=OVERFLOWS.keys())
def test_a_step_that_would_overflow_fails_and_changes_nothing(driver: Driver, scale: float, adam: AdamParams) -> None:
    adapter = _adapter(driver)
    grad = _fill_grad(adapter, 0, scale)
    before = [adapter.weights.clone(), adapter.exp_avg.clone(), adapter.exp_avg_sq.clone()]
    (outcome,) = driver.run(("m", OptimStep(adam=adam)))
    assert isinstance(outcome, Failed)
    assert outcome.code == "non_finite"
    for got, want in zip((adapter.weights, adapter.exp_avg, adapter.exp_avg_sq), before, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(adapter.grad, grad)
    assert adapter.step == 0
