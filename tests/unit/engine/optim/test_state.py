"""The state of every optimizer: its size, what bf16 does to training, repetition to the bit, and what fails leaves it alone."""

from contextlib import AbstractContextManager

import pytest
import torch
from tests.support.trained import CPU, FlatModel, assert_same_bits, random_grad
from torch import Tensor

from gradstream.engine.optim import _elements, update
from gradstream.engine.optim._base import OPTIMIZERS
from gradstream.engine.optim._rounding import Noise
from gradstream.engine.optim.state import check_optimizer, named_state, new_state, state_parts
from gradstream.shared.errors import InvalidRequest, NonFinite
from gradstream.shared.wire import AdamParams, OptimizerSpec

SHAPES = {"matrix.a": (40, 30), "bias": (100,), "matrix.experts": (3, 20, 10), "embedding": (50, 9)}
SPECS = {
    "adamw": OptimizerSpec(),
    "anyprecision_adamw": OptimizerSpec(type="anyprecision_adamw"),
    "anyprecision_adamw without kahan": OptimizerSpec(type="anyprecision_adamw", kahan=False),
    "sgd": OptimizerSpec(type="sgd", momentum=0.9),
    "muon": OptimizerSpec(type="muon"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def with_dtype(spec: OptimizerSpec, dtype: str) -> OptimizerSpec:
    return type(spec)(**{name: getattr(spec, name) for name in spec.__struct_fields__} | {"dtype": dtype})


ALL = [
    pytest.param(with_dtype(spec, state), weights, id=f"{name}, {state} state, {weights} weights")
    for name, spec in SPECS.items()
    for state in DTYPES
    for weights in DTYPES
]


def num_bytes(model: FlatModel) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in model.optim.values())


def trained(model: FlatModel, num_steps: int, *, seed: int = 0) -> FlatModel:
    for number in range(num_steps):
        model.step_with(random_grad(model, number), seed=seed, learning_rate=0.01, weight_decay=0.1, eps=1e-8)
    return model


def test_there_are_cases_for_every_optimizer() -> None:
    assert {spec.type for spec in SPECS.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_bf16_state_takes_half_the_bytes(spec: OptimizerSpec) -> None:
    full, half = (trained(FlatModel(SHAPES, with_dtype(spec, dtype)), 2) for dtype in DTYPES)
    assert num_bytes(half) * 2 == num_bytes(full) > 0


def test_muon_keeps_one_number_of_a_matrix_and_two_of_the_rest() -> None:
    model = FlatModel(SHAPES, SPECS["muon"])
    assert {name: tensor.numel() for name, tensor in model.optim.items()} == {
        "momentum": 1800,
        "exp_avg": 550,
        "exp_avg_sq": 550,
    }


def test_sgd_without_momentum_keeps_nothing() -> None:
    assert FlatModel(SHAPES, OptimizerSpec(type="sgd")).optim == {}


@pytest.mark.parametrize(("spec", "weights"), ALL)
def test_the_same_steps_give_the_same_bits(spec: OptimizerSpec, weights: str) -> None:
    one, two = (trained(FlatModel(SHAPES, spec, dtype=DTYPES[weights]), 4) for _ in range(2))
    assert_same_bits(one.content(), two.content())


@pytest.mark.parametrize(("spec", "weights"), ALL)
def test_the_size_of_the_pieces_and_computing_twice_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, spec: OptimizerSpec, weights: str
) -> None:
    want = trained(FlatModel(SHAPES, spec, dtype=DTYPES[weights]), 4).content()
    monkeypatch.setattr(_elements, "_CPU_NUMBERS", 256)
    monkeypatch.setattr(update, "_KEPT_NUMBERS", 0)
    assert_same_bits(trained(FlatModel(SHAPES, spec, dtype=DTYPES[weights]), 4).content(), want)


@pytest.mark.parametrize("change", [{"seed": 1}, {"name": "n"}], ids=["seed", "model"])
def test_the_rounding_depends_on_the_engines_seed_and_the_model(change: dict[str, object]) -> None:
    spec = OptimizerSpec(dtype="bf16")
    one = trained(FlatModel(SHAPES, spec), 2)
    other = trained(FlatModel(SHAPES, spec, name=str(change.get("name", "m"))), 2, seed=int(str(change.get("seed", 0))))
    assert not torch.equal(one.optim["exp_avg"], other.optim["exp_avg"])


def nearest(_: Noise, __: str, ___: int, count: int, *, device: torch.device) -> Tensor:
    """Noise that makes stochastic rounding plain rounding."""
    return torch.full((count,), 1 << 15, dtype=torch.int32, device=device)


def distance_after(
    spec: OptimizerSpec,
    num_steps: int,
    *,
    away: float,
    lr: float,
    beta2: float = 0.999,
    first: float = 1.0,
    **fields: torch.dtype,
) -> float:
    """How far the weights end from a target that is `away` at the start, with a gradient towards it of 1 at most.

    first: what the first gradient is multiplied by.
    """
    model = FlatModel({"matrix": (8, 16)}, spec, **fields)
    target = model.weights.float() + away
    for number in range(num_steps):
        grad = (model.weights.float() - target).clamp(-1, 1)
        model.step_with(grad if number else first * grad, learning_rate=lr, beta2=beta2, eps=1e-8)
    return float((model.weights.float() - target).abs().mean())


def test_with_bf16_moments_training_arrives_where_plain_rounding_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    # After one gradient 300 times too large the second moment has to shrink, by two thousandths a step.
    run = {"num_steps": 2500, "away": 10.0, "lr": 0.02, "beta2": 0.998, "first": 300.0}
    half = OptimizerSpec(dtype="bf16")
    exact = distance_after(OptimizerSpec(), **run)  # type: ignore[arg-type]
    assert exact < 0.05
    # Of ten that it began with, stochastic rounding ends within 0.05 of where fp32 does.
    assert distance_after(half, **run) < exact + 0.05  # type: ignore[arg-type]
    monkeypatch.setattr(Noise, "bits", nearest)
    # Two thousandths are less than half the distance to the next bf16, so it stays, and so do the small steps.
    assert distance_after(half, **run) > 5.0  # type: ignore[arg-type]


BF16_WEIGHTS = {
    "adamw": OptimizerSpec(dtype="bf16"),
    "kahan": OptimizerSpec(type="anyprecision_adamw", dtype="bf16"),
    "without kahan": OptimizerSpec(type="anyprecision_adamw", dtype="bf16", kahan=False),
}


@pytest.mark.parametrize("spec", BF16_WEIGHTS.values(), ids=BF16_WEIGHTS.keys())
def test_with_bf16_weights_training_arrives_where_plain_rounding_stalls(
    monkeypatch: pytest.MonkeyPatch, spec: OptimizerSpec
) -> None:
    run = {"num_steps": 900, "away": 10.0, "lr": 0.02}
    exact = distance_after(OptimizerSpec(), **run)  # type: ignore[arg-type]
    assert exact < 0.05
    assert distance_after(spec, dtype=torch.bfloat16, **run) < exact + 0.1  # type: ignore[arg-type]
    monkeypatch.setattr(Noise, "bits", nearest)
    # From eight on, neighbouring bf16 numbers are 0.06 apart, and the steps are of 0.02.
    assert distance_after(OptimizerSpec(), dtype=torch.bfloat16, **run) > 1.5  # type: ignore[arg-type]


def test_kahan_keeps_what_stochastic_rounding_only_keeps_on_average() -> None:
    """Sixteen bits of mantissa follow fp32 closer than eight do."""
    models = [FlatModel(SHAPES, spec, dtype=torch.bfloat16) for spec in list(BF16_WEIGHTS.values())[1:]]
    exact = FlatModel(SHAPES, OptimizerSpec())
    exact.weights.copy_(models[0].weights)
    for model in (*models, exact):
        for number in range(50):
            model.step_with(random_grad(model, number), learning_rate=1e-3, eps=1e-8)
    kahan, stochastic = ((model.weights.float() - exact.weights).abs().mean() for model in models)
    assert float(kahan) < float(stochastic) / 2


@pytest.mark.parametrize(("spec", "weights"), ALL)
def test_an_update_that_would_overflow_changes_nothing(spec: OptimizerSpec, weights: str) -> None:
    model = trained(FlatModel(SHAPES, spec, dtype=DTYPES[weights]), 2)
    model.grad.copy_(random_grad(model, 0))
    model.has_grad, model.valid_tokens, num_syncs = True, 5, model.num_syncs
    before = model.content()
    with pytest.raises(NonFinite, match="step 3 of model m would make weights or moments nan or inf"):
        update.update(model, AdamParams(learning_rate=3e38, weight_decay=3e38 if spec.type != "sgd" else 1e3), seed=0)
    assert_same_bits(model.content(), before)
    assert (model.step, model.has_grad, model.valid_tokens, model.num_syncs) == (2, True, 5, num_syncs)


@pytest.mark.parametrize(("spec", "weights"), ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(spec: OptimizerSpec, weights: str, bad: float) -> None:
    model = trained(FlatModel(SHAPES, spec, dtype=DTYPES[weights]), 2)
    model.grad[7] = bad
    before = model.content()
    with pytest.raises(NonFinite, match="the gradient norm of model m is"):
        update.update(model, AdamParams(), seed=0)
    assert_same_bits(model.content(), before)


def test_muon_is_refused_for_weights_that_would_overflow_without_its_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradstream.engine.optim import muon

    model = FlatModel({"matrix": (4, 4)}, OptimizerSpec(type="muon", muon_lr=1e38))
    monkeypatch.setattr(muon, "orthogonalized", None)
    model.grad.copy_(random_grad(model, 0))
    with pytest.raises(NonFinite):
        update.update(model, AdamParams(), seed=0)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_piece_holds_no_more_than_its_share(monkeypatch: pytest.MonkeyPatch, spec: OptimizerSpec, dtype: str) -> None:
    monkeypatch.setattr(_elements, "_CPU_NUMBERS", 256)
    model = FlatModel({"embedding": (1000,), "matrix.small": (20, 4, 4)}, with_dtype(spec, dtype))
    sizes: list[int] = []
    found = update._apply

    def watch(step: update.Step, compute_dtype: torch.dtype, computing: AbstractContextManager[None]) -> bool:
        pieces = list(OPTIMIZERS[spec.type].pieces(step))
        sizes.extend(change.value.numel() for piece in pieces for change in piece.compute())
        return found(step, compute_dtype, computing)

    monkeypatch.setattr(update, "_apply", watch)
    trained(model, 1)
    assert max(sizes) <= 256
    assert sum(sizes) == sum(tensor.numel() for tensor in (model.weights, *model.optim.values()))


BAD = {
    "momentum of one": (OptimizerSpec(type="sgd", momentum=1.0), "optimizer.momentum: 1.0"),
    "nan momentum": (OptimizerSpec(type="sgd", momentum=float("nan")), "optimizer.momentum: nan"),
    "dampening": (OptimizerSpec(type="sgd", momentum=0.5, dampening=-0.1), "optimizer.dampening: -0.1"),
    "nesterov without momentum": (OptimizerSpec(type="sgd", nesterov=True), "optimizer.nesterov"),
    "nesterov with dampening": (OptimizerSpec(type="sgd", momentum=0.5, dampening=0.5, nesterov=True), "optimizer.nesterov"),
    "muon_lr": (OptimizerSpec(type="muon", muon_lr=-1.0), "optimizer.muon_lr: -1.0"),
    "infinite muon_lr": (OptimizerSpec(type="muon", muon_lr=float("inf")), "optimizer.muon_lr: inf"),
    "muon_momentum": (OptimizerSpec(type="muon", muon_momentum=1.5), "optimizer.muon_momentum: 1.5"),
    "no iterations": (OptimizerSpec(type="muon", muon_ns_steps=0), "optimizer.muon_ns_steps: 0"),
    "base rate": (OptimizerSpec(type="muon", learning_rate=0.0), "optimizer.learning_rate: 0.0"),
    "of another": (OptimizerSpec(momentum=0.9), "optimizer.momentum: 0.9 means nothing to adamw"),
    "of yet another": (OptimizerSpec(type="sgd", muon_lr=0.1), "optimizer.muon_lr: 0.1 means nothing to sgd"),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), BAD.values(), ids=BAD.keys())
def test_a_setting_that_cannot_be_is_refused_by_name(spec: OptimizerSpec, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check_optimizer(spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_settings_that_can_be_are_accepted(spec: OptimizerSpec) -> None:
    check_optimizer(spec)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_each_number_of_the_state_has_one_name(spec: OptimizerSpec) -> None:
    layout = FlatModel(SHAPES, spec).layout
    parts = state_parts(spec, layout)
    state = new_state(parts, device=CPU)
    for view in named_state(parts, state).values():
        view.add_(1)
    assert all(bool((tensor == 1).all()) for tensor in state.values())


def test_a_mean_is_divided_by_its_tokens_once_and_before_clipping() -> None:
    shapes, grad = {"bias": (64,)}, torch.full((64,), 3.0)
    mean, plain = (
        FlatModel(shapes, OptimizerSpec(type="sgd"), reduction="token_mean"),
        FlatModel(shapes, OptimizerSpec(type="sgd")),
    )
    mean.valid_tokens = 12
    mean.grad.copy_(grad)
    facts = update.update(mean, AdamParams(learning_rate=1.0, grad_clip_norm=1.0), seed=0)
    assert facts.grad_norm == pytest.approx(3.0 / 12 * 8)
    plain.step_with(grad / 12, learning_rate=1.0, grad_clip_norm=1.0)
    torch.testing.assert_close(mean.weights, plain.weights)
    assert mean.valid_tokens == 0


def test_a_mean_over_no_tokens_is_a_step_without_gradient() -> None:
    model = FlatModel({"bias": (4,)}, OptimizerSpec(type="sgd"), reduction="token_mean")
    before = model.weights.clone()
    assert update.update(model, AdamParams(), seed=0).grad_norm == 0.0
    assert torch.equal(model.weights, before)
