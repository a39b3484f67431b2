"""Each optimizer, step by step, against torch's own."""

import math

import pytest
import torch
from tests.support.trained import FlatModel, random_grad
from torch import Tensor, nn

from gradstream.engine.optim import _elements
from gradstream.engine.optim.muon import _MAX_ENTRY, orthogonalized
from gradstream.shared.wire import OptimizerSpec

SHAPES = {"matrix.a": (6, 4), "bias": (5,), "embedding": (7, 3)}
MATRICES = {"matrix.wide": (6, 10), "bias": (5,), "matrix.tall": (12, 4), "matrix.experts": (3, 8, 5)}
ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def parameters(model: FlatModel) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(tensor) for name, tensor in model.named(model.weights).items()}


def give_grad(model: FlatModel, grad: Tensor, found: dict[str, nn.Parameter]) -> None:
    for name, part in model.named(grad).items():
        found[name].grad = part.to(found[name].dtype)


def assert_close(model: FlatModel, found: dict[str, nn.Parameter], *, rtol: float = 2e-6, atol: float = 2e-7) -> None:
    for name, values in model.named(model.weights).items():
        torch.testing.assert_close(values, found[name].detach().to(values.dtype), rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "anyprecision_adamw"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adamw_is_torchs(kind: str, decay: float, clip: float) -> None:
    model = FlatModel(SHAPES, OptimizerSpec(type=kind))  # type: ignore[arg-type]
    found = parameters(model)
    oracle = torch.optim.AdamW(found.values(), foreach=False)
    for number in range(8):
        grad, lr = random_grad(model, number), 0.02 * (number + 1)
        give_grad(model, grad, found)
        if clip:
            nn.utils.clip_grad_norm_(found.values(), clip)
        oracle.param_groups[0].update(lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
        oracle.step()
        model.step_with(grad, learning_rate=lr, weight_decay=decay, grad_clip_norm=clip, **ADAM)
        assert_close(model, found)
    for name in ("exp_avg", "exp_avg_sq"):
        for tensor, values in model.named(model.optim[name]).items():
            torch.testing.assert_close(values, oracle.state[found[tensor]][name], rtol=1e-5, atol=1e-7)


SGD = {
    "plain": OptimizerSpec(type="sgd"),
    "momentum": OptimizerSpec(type="sgd", momentum=0.9),
    "dampening": OptimizerSpec(type="sgd", momentum=0.9, dampening=0.3),
    "nesterov": OptimizerSpec(type="sgd", momentum=0.8, nesterov=True),
}


@pytest.mark.parametrize("spec", SGD.values(), ids=SGD.keys())
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sgd_is_torchs(spec: OptimizerSpec, decay: float) -> None:
    model = FlatModel(SHAPES, spec)
    found = parameters(model)
    oracle = torch.optim.SGD(
        found.values(), momentum=spec.momentum, dampening=spec.dampening, nesterov=spec.nesterov, weight_decay=decay
    )
    for number in range(8):
        grad, lr = random_grad(model, number), 0.02 * (number + 1)
        give_grad(model, grad, found)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        model.step_with(grad, learning_rate=lr, weight_decay=decay)
        assert_close(model, found)
    assert list(model.optim) == (["momentum"] if spec.momentum else [])


def newton_schulz(matrix: Tensor, num_steps: int) -> Tensor:
    """The quintic iteration of one float64 matrix, by its singular values: X U V^T commutes with the polynomial."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / max(float(s.norm()), 1e-7)
    for _ in range(num_steps):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    result: Tensor = u @ torch.diag(s) @ v
    return result


class DoubleMuon:
    """Muon in float64, one matrix at a time."""

    def __init__(self, matrix: Tensor, spec: OptimizerSpec) -> None:
        self.matrix, self.spec = matrix.double(), spec
        self.momentum = torch.zeros_like(self.matrix)

    def step(self, grad: Tensor, rate: float, decay: float) -> None:
        spec, grad = self.spec, grad.double()
        self.momentum = spec.muon_momentum * self.momentum + (1 - spec.muon_momentum) * grad
        direction = self.momentum
        if spec.muon_nesterov:
            direction = (1 - spec.muon_momentum) * grad + spec.muon_momentum * self.momentum
        rows, columns = self.matrix.shape
        if spec.muon_adjust_lr_fn == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        else:
            scale = math.sqrt(max(1, rows / columns))
        self.matrix = self.matrix * (1 - rate * decay)
        self.matrix -= rate * scale * newton_schulz(direction, spec.muon_ns_steps)


MUON = {
    "defaults": OptimizerSpec(type="muon"),
    "without nesterov": OptimizerSpec(type="muon", muon_nesterov=False, muon_momentum=0.8),
    "scaled like adamw": OptimizerSpec(type="muon", muon_adjust_lr_fn="match_rms_adamw", muon_lr=0.003),
    "three iterations": OptimizerSpec(type="muon", muon_ns_steps=3, muon_adjust_lr_fn="original"),
}


@pytest.mark.parametrize("at_a_time", [1, 1 << 18], ids=["a matrix at a time", "experts together"])
@pytest.mark.parametrize("spec", MUON.values(), ids=MUON.keys())
def test_muon_moves_each_matrix_and_each_expert_as_in_double_precision_and_the_rest_by_adamw(
    monkeypatch: pytest.MonkeyPatch, spec: OptimizerSpec, at_a_time: int
) -> None:
    monkeypatch.setattr(_elements, "_CPU_NUMBERS", at_a_time)
    model = FlatModel(MATRICES, spec)
    start = model.named(model.weights)
    oracles = {
        name: [DoubleMuon(one, spec) for one in start[name].view(-1, *start[name].shape[-2:])]
        for name in start
        if name.startswith("matrix")
    }
    bias = nn.Parameter(start["bias"])
    adamw = torch.optim.AdamW([bias], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for number in range(5):
        grad, lr = random_grad(model, number), 0.01 * (number + 1)
        parts = model.named(grad)
        for name, ones in oracles.items():
            for oracle, one in zip(ones, parts[name].view(-1, *parts[name].shape[-2:]), strict=True):
                oracle.step(one, spec.muon_lr, 0.1)
        bias.grad = parts["bias"]
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        model.step_with(grad, learning_rate=lr, weight_decay=0.1, **ADAM)
    got = model.named(model.weights)
    torch.testing.assert_close(got["bias"], bias.detach(), rtol=2e-6, atol=2e-7)
    for name, ones in oracles.items():
        want = torch.stack([one.matrix for one in ones]).view(got[name].shape)
        torch.testing.assert_close(got[name].double(), want, rtol=1e-5, atol=1e-5)


def test_muon_is_torchs_but_for_the_bf16_products_there() -> None:
    spec = OptimizerSpec(type="muon", muon_lr=0.02)
    model = FlatModel({"matrix.wide": (16, 40), "matrix.tall": (48, 12)}, spec)
    found = parameters(model)
    oracle = torch.optim.Muon(found.values(), lr=0.02, momentum=0.95, nesterov=True, ns_steps=5, weight_decay=0.1)
    for number in range(5):
        grad = random_grad(model, number)
        give_grad(model, grad, found)
        oracle.step()
        model.step_with(grad, learning_rate=123.0, weight_decay=0.1)
    # One update moves an entry by up to 0.04; bf16 products are right to about a hundredth of that.
    assert_close(model, found, rtol=0, atol=4e-3)


def test_the_rate_of_matrices_is_muon_lr_whatever_rate_a_step_brings() -> None:
    models = [FlatModel({"matrix": (6, 6)}, OptimizerSpec(type="muon")) for _ in range(2)]
    for model, lr in zip(models, (1e-5, 0.3), strict=True):
        model.step_with(random_grad(model, 0), learning_rate=lr)
    assert torch.equal(models[0].weights, models[1].weights)


def test_with_a_base_rate_the_step_rate_over_it_multiplies_muon_lr() -> None:
    spec = OptimizerSpec(type="muon", muon_lr=0.02, learning_rate=1e-4)
    model = FlatModel({"matrix": (6, 6)}, spec)
    before = model.weights.clone()
    same = FlatModel({"matrix": (6, 6)}, OptimizerSpec(type="muon", muon_lr=0.005))
    model.step_with(random_grad(model, 0), learning_rate=0.25e-4)
    same.step_with(random_grad(model, 0), learning_rate=1.0)
    torch.testing.assert_close(model.weights, same.weights)
    assert not torch.equal(model.weights, before)


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e30], ids=lambda scale: f"{scale:g}")
def test_the_size_of_a_gradient_does_not_matter_to_muon_until_it_is_nothing(scale: float) -> None:
    model, unit = (FlatModel({"matrix": (6, 9)}, OptimizerSpec(type="muon")) for _ in range(2))
    before = model.weights.clone()
    model.step_with(random_grad(model, 0, scale=scale))
    unit.step_with(random_grad(model, 0))
    if scale < 1e-7:
        # The norm counts as 1e-7: the direction is in proportion to the gradient.
        assert torch.equal(model.weights, before)
    else:
        torch.testing.assert_close(model.weights, unit.weights, rtol=1e-4, atol=1e-5)


def test_muon_without_gradient_moves_no_matrix_but_decays_it() -> None:
    model = FlatModel({"matrix": (4, 4)}, OptimizerSpec(type="muon", muon_lr=0.1))
    before = model.weights.clone()
    model.step_with(torch.zeros(16), weight_decay=0.5)
    torch.testing.assert_close(model.weights, before * 0.95)


@pytest.mark.parametrize("scale", [1e-36, 1.0, 3e37])
@pytest.mark.parametrize("kind", ["full", "of rank one"])
@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 40, 24)])
def test_products_in_bf16_come_as_near_to_orthogonal_and_no_entry_exceeds_its_bound(
    shape: tuple[int, ...], kind: str, scale: float
) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    if kind == "of rank one":
        matrices = matrices[:, :, :1] @ matrices[:, :1, :] / 4
    matrices = matrices * scale
    for num_steps in (1, 5, 20):
        for dtype in (torch.float32, torch.bfloat16):
            got = orthogonalized(matrices, num_steps=num_steps, dtype=dtype).double()
            assert float(got.abs().max()) < _MAX_ENTRY
            if scale > 1e-7:
                want = torch.stack([newton_schulz(one.double() / scale, num_steps) for one in matrices])
                tolerance = 1e-4 if dtype == torch.float32 else 0.1
                if kind == "full" and num_steps <= 5:
                    assert float((got - want).norm() / want.norm()) < tolerance
