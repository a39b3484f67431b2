"""Settings of memory that contradict one another, and what they are on each device."""

from pathlib import Path

import msgspec
import pytest

from gradstream.shared.config import ConfigError, Settings, resolve
from gradstream.shared.config.machine import Machine

MODEL = str(Path(__file__).parents[3] / "tests/models/tiny-qwen3-shakespeare")


def resolved(tmp_path: Path, *, has_cuda: bool = False, **values: object) -> Settings:
    given = {"model_path": MODEL, **values}
    settings = msgspec.convert({**given, "explicit": sorted(given)}, Settings)
    return resolve(settings, Machine(num_cores=2, has_cuda=has_cuda, cache_dir=tmp_path)).settings


def refusal(tmp_path: Path, **values: object) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(tmp_path, **values)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.config_field("enable_gradient_checkpointing")
def test_activations_are_recomputed_by_default_on_gpus_only(tmp_path):
    assert resolved(tmp_path, has_cuda=True).enable_gradient_checkpointing
    assert not resolved(tmp_path).enable_gradient_checkpointing
    assert resolved(tmp_path, enable_gradient_checkpointing=True).enable_gradient_checkpointing


@pytest.mark.config_field("enable_reentrant")
def test_the_reentrant_kind_needs_checkpointing(tmp_path):
    assert resolved(tmp_path, has_cuda=True, enable_reentrant=True).enable_reentrant
    assert resolved(tmp_path, enable_gradient_checkpointing=True, enable_reentrant=True).enable_reentrant
    assert "set enable_gradient_checkpointing: true, or use false" in refusal(tmp_path, enable_reentrant=True)


def test_the_reentrant_kind_has_no_further_units(tmp_path):
    found = refusal(tmp_path, has_cuda=True, enable_reentrant=True, basic_modules=["Qwen3MLP"])
    assert found.startswith("basic_modules: Qwen3MLP as units within the units of enable_reentrant: true")


@pytest.mark.config_field("freeze_router")
def test_routers_are_trained_with_full_weights_only(tmp_path):
    assert not resolved(tmp_path, freeze_router=False).freeze_router
    assert "adapters have no place there" in refusal(tmp_path, freeze_router=False, enable_lora=True)


@pytest.mark.config_field("enable_activation_offload")
def test_activations_move_to_cpu_memory_from_elsewhere_only(tmp_path):
    assert resolved(tmp_path, has_cuda=True, enable_activation_offload=True).enable_activation_offload
    assert "on a CPU they are there" in refusal(tmp_path, enable_activation_offload=True)
