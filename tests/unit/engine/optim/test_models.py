"""Adapters that learn by each optimizer: they stop and go on to the same bits, and bf16 state learns as well as fp32."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    DENSE,
    MOE,
    Data,
    Driver,
    create,
    cross_entropy,
    loss_of,
    open_engine,
    random_data,
    randomize,
)
from tests.support.oracle import Oracle, double_leaves, relative_error
from tests.support.snapshots import assert_same_state, restore, snapshot

from gradstream.engine.adapters.adapter import Adapter
from gradstream.shared.ids import ModelId, SessionId
from gradstream.shared.wire import (
    CreateModel,
    Failed,
    LoadWeights,
    LoraSpec,
    OptimizerSpec,
    RestoreSnapshotDone,
    SaveWeights,
)

SPECS = {
    "adamw": OptimizerSpec(),
    "adamw in bf16": OptimizerSpec(dtype="bf16"),
    "anyprecision_adamw in bf16": OptimizerSpec(type="anyprecision_adamw", dtype="bf16"),
    "plain sgd": OptimizerSpec(type="sgd"),
    "sgd in bf16": OptimizerSpec(type="sgd", momentum=0.9, nesterov=True, dtype="bf16"),
    "muon": OptimizerSpec(type="muon", muon_lr=0.002),
    "muon in bf16": OptimizerSpec(type="muon", muon_lr=0.002, dtype="bf16", learning_rate=1e-3),
}


def made(spec: OptimizerSpec | None, *, reduction: str = "sum", rank: int = 4) -> CreateModel:
    return CreateModel(
        session_id=SessionId("s"),
        base_model="tiny",
        lora=LoraSpec(rank=rank, seed=1),
        optimizer=spec,
        reduction=reduction,  # type: ignore[arg-type]
    )


def adapter_of(driver: Driver, model: str = "m") -> Adapter:
    adapter = driver.engine.state.models[ModelId(model)]
    assert isinstance(adapter, Adapter)
    return adapter


def train(driver: Driver, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        losses.append(loss_of(driver.done("m", cross_entropy(random_data([12, 7], seed=number)))))
        driver.step("m", learning_rate=1e-3, weight_decay=0.01, grad_clip_norm=5.0)
    return losses


@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_checkpoint_goes_on_to_the_bits_of_never_having_stopped(
    tmp_path: Path, path: Path, spec: OptimizerSpec
) -> None:
    whole = Driver(open_engine(path, output_dir=tmp_path))
    whole.done("m", made(spec))
    first = train(whole, range(2))
    whole.done("m", SaveWeights(name="a"))
    want = train(whole, range(2, 4))

    loaded = Driver(open_engine(path, output_dir=tmp_path))
    loaded.done("m", made(spec))
    assert train(loaded, range(5, 6)) != first
    loaded.done("m", LoadWeights(path="tinker://m/weights/a", with_optimizer=True))
    assert train(loaded, range(2, 4)) == want
    assert_same_state(*whole.engine.capture([ModelId("m")]), *loaded.engine.capture([ModelId("m")]))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_snapshot_goes_on_to_the_bits_of_never_having_stopped(tmp_path: Path, spec: OptimizerSpec) -> None:
    whole = Driver(open_engine())
    whole.done("m", made(spec, reduction="token_mean"))
    train(whole, range(2))
    whole.done("m", cross_entropy(random_data([5], seed=9)))
    payload = snapshot(whole.engine, tmp_path)
    second = Driver(open_engine())
    assert isinstance(restore(second.engine, payload), RestoreSnapshotDone)
    assert adapter_of(second).optimizer == spec
    assert adapter_of(second).valid_tokens == 5
    assert train(second, range(2, 4)) == train(whole, range(2, 4))
    assert_same_state(*whole.engine.capture([ModelId("m")]), *second.engine.capture([ModelId("m")]))


def test_a_model_made_from_a_checkpoint_with_its_optimizer_has_that_optimizer(tmp_path: Path) -> None:
    driver = Driver(open_engine(output_dir=tmp_path))
    spec = SPECS["sgd in bf16"]
    driver.done("m", made(spec))
    train(driver, range(1))
    driver.done("m", SaveWeights(name="a"))
    for model, with_optimizer in (("with", True), ("without", False)):
        path = "tinker://m/weights/a"
        driver.done(
            model, LoadWeights(path=path, with_optimizer=with_optimizer, create=True, session_id=SessionId("s"))
        )
    assert (adapter_of(driver, "with").optimizer, adapter_of(driver, "with").step) == (spec, 1)
    assert torch.equal(adapter_of(driver, "with").optim["momentum"], adapter_of(driver).optim["momentum"])
    assert (adapter_of(driver, "without").optimizer, adapter_of(driver, "without").step) == (OptimizerSpec(), 0)


def test_a_checkpoint_from_before_there_were_other_optimizers_is_of_adamw_in_fp32(tmp_path: Path) -> None:
    driver = Driver(open_engine(output_dir=tmp_path))
    driver.done("m", made(None))
    train(driver, range(2))
    driver.done("m", SaveWeights(name="a"))
    (path,) = tmp_path.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    del manifest["optimizer"]
    path.write_text(json.dumps(manifest))
    driver.done("n", made(None))
    driver.done("n", LoadWeights(path="tinker://m/weights/a", with_optimizer=True))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(adapter_of(driver, "n").optim[name], adapter_of(driver).optim[name])
    assert adapter_of(driver, "n").step == 2


OTHERS = {
    "another kind": (SPECS["plain sgd"], "adamw .state in fp32.; this model trains by sgd .state in fp32, momentum 0."),
    "another dtype": (SPECS["adamw in bf16"], "adamw .state in fp32.; this model trains by adamw .state in bf16."),
}


@pytest.mark.parametrize(("spec", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_the_state_of_another_optimizer_is_refused_with_both_named_and_the_weights_alone_load(
    tmp_path: Path, spec: OptimizerSpec, message: str
) -> None:
    driver = Driver(open_engine(output_dir=tmp_path))
    driver.done("m", made(None))
    train(driver, range(1))
    driver.done("m", SaveWeights(name="a"))
    driver.done("n", made(spec))
    before = driver.weights("n")
    (outcome,) = driver.run(("n", LoadWeights(path="tinker://m/weights/a", with_optimizer=True)))
    assert isinstance(outcome, Failed)
    assert torch.equal(driver.weights("n"), before)
    with pytest.raises(AssertionError, match=message):
        driver.done("n", LoadWeights(path="tinker://m/weights/a", with_optimizer=True))
    driver.done("n", LoadWeights(path="tinker://m/weights/a", with_optimizer=False))
    assert torch.equal(driver.weights("n"), driver.weights("m"))


def test_a_model_without_an_optimizer_of_its_own_has_the_engines() -> None:
    spec = SPECS["muon in bf16"]
    driver = Driver(open_engine(optimizer=spec))
    driver.done("m", create())
    driver.done("n", made(SPECS["plain sgd"]))
    assert (adapter_of(driver, "m").optimizer, adapter_of(driver, "n").optimizer) == (spec, SPECS["plain sgd"])


def test_an_optimizer_that_cannot_be_makes_no_model() -> None:
    driver = Driver(open_engine())
    (outcome,) = driver.run(("m", made(OptimizerSpec(type="sgd", momentum=2.0))))
    assert isinstance(outcome, Failed)
    assert outcome.code == "invalid_request"
    assert "optimizer.momentum: 2.0" in outcome.message
    assert not driver.engine.state.models


def test_engines_that_learn_in_another_way_have_other_fingerprints_and_the_default_is_not_told() -> None:
    plain, muon = (open_engine(optimizer=spec).card(epoch=1).fingerprint for spec in (OptimizerSpec(), SPECS["muon"]))
    assert "optimizer" not in plain
    assert muon == f'{plain} optimizer={{"type":"muon","muon_lr":0.002}}'


def pattern() -> Data:
    """Text that repeats, which a model learns by heart."""
    rng = np.random.default_rng(5)
    tokens = np.tile(rng.integers(0, 2048, 8), 4)
    return Data([tokens[:-1].astype(np.int32)], [tokens[1:]], [np.ones(31, dtype=np.float32)])


@pytest.mark.parametrize("kind", ["adamw", "anyprecision_adamw", "muon"])
def test_an_adapter_with_bf16_state_learns_as_well_as_with_fp32(kind: str) -> None:
    losses = {}
    for dtype in ("fp32", "bf16"):
        driver = Driver(open_engine())
        driver.done("m", made(OptimizerSpec(type=kind, dtype=dtype, **({"muon_lr": 0.01} if kind == "muon" else {}))))  # type: ignore[arg-type]
        seen = []
        for _ in range(40):
            seen.append(loss_of(driver.done("m", cross_entropy(pattern()))) / 31)
            driver.step("m", learning_rate=3e-3, beta2=0.999, eps=1e-8)
        losses[dtype] = seen
    assert losses["fp32"][-1] < 0.2 * losses["fp32"][0]
    # Within three hundredths of the way down that both went.
    assert abs(losses["bf16"][-1] - losses["fp32"][-1]) < 0.03 * losses["fp32"][0]


def test_steps_of_a_token_mean_adapter_are_torch_adamw_on_the_mean_over_unequal_calls() -> None:
    driver = Driver(open_engine())
    driver.done("m", made(None, reduction="token_mean"))
    randomize(driver, "m")
    adapter = adapter_of(driver)
    pairs = double_leaves(adapter.named_views(adapter.weights))
    leaves = [factor for pair in pairs.values() for factor in pair]
    optimizer = torch.optim.AdamW(leaves, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    oracle = Oracle(DENSE)
    calls = [random_data([4, 11], seed=1), random_data([29], seed=2)]
    for data in calls:
        data.weights = [np.ones_like(weights) for weights in data.weights]
    for _ in range(3):
        total = torch.stack([oracle.cross_entropy(data, pairs, adapter.scale)[0] for data in calls]).sum()
        (total / 44).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(leaves, 0.05))
        optimizer.step()
        optimizer.zero_grad()
        for data in calls:
            driver.done("m", cross_entropy(data))
        outcome = driver.step(
            "m", learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.05
        )
        assert outcome.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)  # type: ignore[union-attr]
    assert norm > 0.05
    for name, pair in adapter.named_views(adapter.weights).items():
        assert relative_error(pair.a, pairs[name].a.detach()) < 1e-4, name
        assert relative_error(pair.b, pairs[name].b.detach()) < 1e-4, name
