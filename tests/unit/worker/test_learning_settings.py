"""Each setting of the optimizer, from a config to what an engine does in a training step."""

from pathlib import Path

import msgspec
import pytest
import torch
from tests.support.engine_builders import Driver, create, cross_entropy, random_data

from gradstream.engine.engine import Engine
from gradstream.engine.parallel.comm import Comm
from gradstream.shared.config import Settings, resolve
from gradstream.shared.config.machine import Machine
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import OptimStepDone
from gradstream.worker.parts import engine_config

MODEL = Path(__file__).parents[2] / "models" / "tiny-qwen3-shakespeare"


def driver_of(tmp_path: Path, **values: object) -> Driver:
    """A server's engine with one adapter."""
    given = {"model_path": str(MODEL), "model_name": "tiny", "enable_lora": True, "torch_threads": 1, **values}
    settings = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    resolved = resolve(settings, Machine(num_cores=1, has_cuda=False, cache_dir=tmp_path)).settings
    driver = Driver(Engine.open(engine_config(resolved, model_path=MODEL), Comm.single()))
    driver.done("m", create(rank=2, train_mlp=False, train_unembed=False))
    return driver


def weights_after(tmp_path: Path, **values: object) -> torch.Tensor:
    """Of two steps."""
    driver = driver_of(tmp_path, **values)
    for number in range(2):
        driver.done("m", cross_entropy(random_data([9], seed=number)))
        driver.step("m", learning_rate=1e-3)
    return driver.weights("m")


def rates(tmp_path: Path, num_steps: int, **values: object) -> list[float]:
    driver = driver_of(tmp_path, **values)
    found = []
    for _ in range(num_steps):
        outcome = driver.step("m", learning_rate=0.5)
        assert isinstance(outcome, OptimStepDone)
        found.append(outcome.metrics["lr"])
    return found


@pytest.mark.config_field("optimizer")
def test_each_optimizer_moves_the_weights_elsewhere(tmp_path: Path) -> None:
    found = [weights_after(tmp_path, optimizer=name) for name in ("adamw", "sgd", "muon")]
    assert not any(torch.equal(one, other) for one, other in zip(found, found[1:] + found[:1], strict=True))
    # Adapters have no bf16 weights whose rounding could lose anything.
    assert torch.equal(weights_after(tmp_path, optimizer="anyprecision_adamw"), found[0])


@pytest.mark.config_field("optimizer_dtype")
def test_bf16_state_is_what_a_model_has_when_it_is_written(tmp_path: Path) -> None:
    for values, dtype in (({}, torch.float32), ({"optimizer_dtype": "bf16"}, torch.bfloat16)):
        model = driver_of(tmp_path, **values).engine.state.models[ModelId("m")]
        assert {tensor.dtype for tensor in model.optim.values()} == {dtype}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("muon_lr", 0.04, marks=pytest.mark.config_field("muon_lr")),
        pytest.param("muon_momentum", 0.5, marks=pytest.mark.config_field("muon_momentum")),
        pytest.param("muon_nesterov", False, marks=pytest.mark.config_field("muon_nesterov")),
        pytest.param("muon_ns_steps", 3, marks=pytest.mark.config_field("muon_ns_steps")),
        pytest.param("muon_adjust_lr_fn", "match_rms_adamw", marks=pytest.mark.config_field("muon_adjust_lr_fn")),
    ],
)
def test_every_setting_of_muon_changes_where_it_goes(tmp_path: Path, field: str, value: object) -> None:
    plain = weights_after(tmp_path, optimizer="muon")
    assert not torch.equal(weights_after(tmp_path, optimizer="muon", **{field: value}), plain)
    assert torch.equal(weights_after(tmp_path, optimizer="muon"), plain)


def test_muon_scaled_in_the_original_way_is_the_default(tmp_path: Path) -> None:
    original = weights_after(tmp_path, optimizer="muon", muon_adjust_lr_fn="original")
    assert torch.equal(original, weights_after(tmp_path, optimizer="muon"))


def test_without_a_schedule_the_rate_is_the_clients(tmp_path: Path) -> None:
    assert rates(tmp_path, 3) == [0.5, 0.5, 0.5]


@pytest.mark.config_field("lr_schedule", "lr_warmup_steps", "lr_total_steps", "lr_min_ratio")
def test_a_schedule_multiplies_the_clients_rate_by_the_models_own_steps(tmp_path: Path) -> None:
    linear = {"lr_schedule": "linear", "lr_warmup_steps": 2, "lr_total_steps": 6, "lr_min_ratio": 0.2}
    assert rates(tmp_path, 7, **linear) == pytest.approx([0.25, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])
    cosine = {"lr_schedule": "cosine", "lr_total_steps": 4}
    assert rates(tmp_path, 4, **cosine) == pytest.approx([0.426776695, 0.25, 0.073223305, 0.0])
    assert rates(tmp_path, 3, lr_schedule="constant", lr_warmup_steps=2) == [0.25, 0.5, 0.5]


def test_muons_matrices_follow_the_schedule_too(tmp_path: Path) -> None:
    half = {"lr_schedule": "constant", "lr_warmup_steps": 2}
    scheduled = driver_of(tmp_path, optimizer="muon", **half)
    plain = driver_of(tmp_path, optimizer="muon", muon_lr=0.01)
    for driver in (scheduled, plain):
        driver.done("m", cross_entropy(random_data([9])))
        driver.step("m", learning_rate=1e-3)
    torch.testing.assert_close(scheduled.weights("m"), plain.weights("m"))
