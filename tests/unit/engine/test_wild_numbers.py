"""No number that a client can send ends the engine: a job with it is done or fails, and the weights stay finite."""

import math
from typing import get_args, get_type_hints

import msgspec
import numpy as np
import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize
from tests.support.snapshots import restore, snapshot

from gradstream.engine.losses._base import LOSSES
from gradstream.engine.optim._base import OPTIMIZERS
from gradstream.shared.catalog import LossCard
from gradstream.shared.columns import Column
from gradstream.shared.hyperparameters import MAX_FLOAT32
from gradstream.shared.ids import ModelId, SessionId
from gradstream.shared.wire import (
    AdamParams,
    CreateModel,
    Failed,
    ForwardBackward,
    LoadWeights,
    LoraSpec,
    OptimizerSpec,
    OptimStep,
    Outcome,
    Payload,
    Sample,
    SamplingParams,
    SaveForSampler,
    SaveWeights,
)

MODEL = "s:train:0"
TOKENS = 6
BEYOND = math.nextafter(MAX_FLOAT32, math.inf)
WILD = [0.0, 5e-324, 1e-320, 1e-300, 1e-40, 1e-7, 1.0, 1e30, MAX_FLOAT32, BEYOND, 1e39, 1e308]
WILD += [-value for value in WILD] + [math.inf, -math.inf, math.nan]
ADAM = sorted(AdamParams.__struct_fields__)
SPEC_NUMBERS = sorted(name for name, kind in get_type_hints(OptimizerSpec).items() if float in (kind, *get_args(kind)))


def outcome_of(driver: Driver, payload: Payload, *, model: str = MODEL) -> Outcome:
    """Of one job; whatever becomes of it, what the engine holds is finite."""
    (outcome,) = driver.run((model, payload))
    models = driver.engine.state.models
    for trained in [models[model_id] for model_id in models]:
        assert bool(trained.weights.isfinite().all())
        assert bool(trained.grad.isfinite().all())
        assert all(bool(tensor.isfinite().all()) for tensor in trained.optim.values())
    return outcome


def create(*, alpha: float | None = None, optimizer: OptimizerSpec | None = None, rank: int = 4) -> CreateModel:
    lora = LoraSpec(rank=rank, seed=1, alpha=alpha)
    return CreateModel(session_id=SessionId("s"), base_model="tiny", lora=lora, optimizer=optimizer)


def job_of(card: LossCard, **params: float | str) -> ForwardBackward:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 2000, TOKENS)
    inputs = {"target_tokens": Column.of([tokens], dtype="int64")}
    for spec in card.inputs:
        if spec.name not in inputs and spec.fallback is None:
            values = np.full(TOKENS, 1.0) if spec.minimum == 0 else rng.normal(size=TOKENS) - 1
            inputs[spec.name] = Column.of([values.astype(np.float32)], dtype="float32")
    return ForwardBackward(
        tokens=Column.of([tokens.astype(np.int32)], dtype="int32"),
        inputs=inputs,
        loss_fn=card.name,
        loss_config=dict(params),
    )


def switches(card: LossCard) -> list[dict[str, float | str]]:
    """Nothing, and everything that turns a part of the loss on."""
    on: dict[str, float | str] = {}
    for param in card.params:
        if param.choices:
            on[param.name] = param.choices[-1]
        elif param.default is None or param.default == 0.0:
            on[param.name] = max(1.0, param.minimum or 0.0)
    return [{}, on]


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_no_parameter_of_a_loss_ends_the_engine(name: str) -> None:
    driver = Driver(open_engine())
    driver.done(MODEL, create())
    randomize(driver, MODEL)
    card = LOSSES[name].card
    assert not isinstance(outcome_of(driver, job_of(card)), Failed)
    for others in switches(card):
        for param in card.params:
            for value in WILD:
                outcome = outcome_of(driver, job_of(card, **{**others, param.name: value}))
                if not abs(value) <= MAX_FLOAT32:
                    assert isinstance(outcome, Failed), (param.name, value)
                    assert f"loss_fn_config.{param.name}" in outcome.message


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_no_number_of_a_step_ends_the_engine(kind: str, dtype: str) -> None:
    driver = Driver(open_engine())
    momentum = {"momentum": 0.9} if kind == "sgd" else {"learning_rate": 1e-4} if kind == "muon" else {}
    spec = OptimizerSpec(type=kind, dtype=dtype, **momentum)
    driver.done(MODEL, create(optimizer=spec))
    data = cross_entropy(random_data([TOKENS]))
    for name in ADAM:
        for value in WILD:
            driver.done(MODEL, data)
            outcome = outcome_of(driver, OptimStep(adam=AdamParams(**{name: value})))
            if not abs(value) <= MAX_FLOAT32:
                assert isinstance(outcome, Failed), (name, value)
                assert f"adam_params.{name}" in outcome.message
            if not isinstance(outcome, Failed):
                driver.engine.state.models[ModelId(MODEL)].weights.mul_(0)
                randomize(driver, MODEL)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_no_number_of_an_optimizer_ends_the_engine(kind: str) -> None:
    driver = Driver(open_engine())
    data = cross_entropy(random_data([TOKENS]))
    for number, (name, value) in enumerate((name, value) for name in SPEC_NUMBERS for value in WILD):
        model = f"s:train:{number}"
        more = {"momentum": 0.5} if kind == "sgd" and name == "dampening" else {}
        spec = msgspec.structs.replace(OptimizerSpec(type=kind), **{**more, name: value})
        made = outcome_of(driver, create(optimizer=spec), model=model)
        if isinstance(made, Failed):
            assert f"optimizer.{name}" in made.message
            continue
        assert abs(value) <= MAX_FLOAT32
        for _ in range(2):
            outcome_of(driver, data, model=model)
            outcome_of(driver, OptimStep(adam=AdamParams()), model=model)
        del driver.engine.state.models[ModelId(model)]


@pytest.mark.parametrize("value", WILD, ids=repr)
def test_no_alpha_ends_the_engine(value: float) -> None:
    driver = Driver(open_engine())
    made = outcome_of(driver, create(alpha=value))
    assert isinstance(made, Failed) == (not 0 < value <= MAX_FLOAT32)
    if isinstance(made, Failed):
        assert "lora.alpha" in made.message
        return
    randomize(driver, MODEL)
    outcome_of(driver, cross_entropy(random_data([TOKENS])))
    outcome_of(driver, OptimStep(adam=AdamParams()))


def test_no_alpha_in_a_checkpoint_ends_the_engine(tmp_path) -> None:
    driver = Driver(open_engine(output_dir=tmp_path))
    driver.done(MODEL, create())
    driver.engine.state.models[ModelId(MODEL)].scale = 1e307
    driver.done(MODEL, SaveWeights(name="wild"))
    driver.done(MODEL, SaveForSampler(name="wild"))
    other = Driver(open_engine(output_dir=tmp_path))
    sampled = outcome_of(other, sample(path=f"tinker://{MODEL}/sampler_weights/wild"), model="s:sample:0")
    load = LoadWeights(
        path=f"tinker://{MODEL}/weights/wild", with_optimizer=True, create=True, session_id=SessionId("s")
    )
    for outcome in (sampled, outcome_of(other, load)):
        assert isinstance(outcome, Failed)
        assert "alpha / rank" in outcome.message


def test_no_scale_in_a_snapshot_ends_the_engine(tmp_path) -> None:
    driver = Driver(open_engine())
    driver.done(MODEL, create())
    driver.engine.state.models[ModelId(MODEL)].scale = 1e307
    taken = snapshot(driver.engine, tmp_path)
    other = open_engine()
    assert "scale: 1e+307 is beyond float32" in restore(other, taken).failed[ModelId(MODEL)]
    assert not other.state.models


def sample(*, path: str | None = None, **params: float) -> Sample:
    prompt = np.arange(5, dtype="<i4").tobytes()
    options = {"max_tokens": 2, "seed": 1, "stop_token_ids": [], **params}
    return Sample(path=path, prompt=prompt, params=SamplingParams(**options), prompt_alt_tokens_k=2)


@pytest.mark.parametrize("name", ["temperature", "top_p"])
def test_no_number_of_a_sample_ends_the_engine(name: str) -> None:
    driver = Driver(open_engine())
    for value in WILD:
        outcome = outcome_of(driver, sample(**{name: value}), model="s:sample:0")
        if not abs(value) <= MAX_FLOAT32:
            assert isinstance(outcome, Failed), value
            assert f"sampling_params.{name}" in outcome.message
    assert not isinstance(outcome_of(driver, sample(), model="s:sample:0"), Failed)
