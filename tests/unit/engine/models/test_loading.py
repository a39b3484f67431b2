"""config_path, init_device and load_weights_mode: where a model's config and weights come from, and by which way."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.support.engine_builders import DENSE
from tests.support.switches import CPU, hidden_of
from transformers import AutoModelForCausalLM

from gradstream.engine.models.build import Build, load_base, load_causal_lm
from gradstream.shared.errors import Unsupported


def load(path: Path = DENSE, **build):
    return load_base(path, device=CPU, dtype=torch.float32, build=Build(**build))


@pytest.fixture
def stretched(tmp_path: Path) -> Path:
    """A config with other rotary frequencies, and nothing beside it."""
    config = json.loads((DENSE / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    path = tmp_path / "config"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """The model with its weights in torch's own format."""
    path = tmp_path / "pickled"
    shutil.copytree(DENSE, path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


@pytest.mark.config_field("config_path")
@torch.no_grad()
def test_another_config_is_what_the_weights_are_computed_with(stretched):
    base = load(config_path=stretched)
    own = load()
    truth = AutoModelForCausalLM.from_pretrained(
        DENSE, config=base.causal_lm.config.__class__.from_pretrained(stretched)
    )
    tokens = torch.randint(base.vocab_size, (24,), generator=torch.Generator().manual_seed(5))
    want = truth.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(hidden_of(base), want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(hidden_of(base), hidden_of(own), rtol=1e-2, atol=1e-2)
    assert base.facts.digest != own.facts.digest


@pytest.mark.config_field("config_path")
def test_a_config_path_without_a_config_is_refused_by_its_name(tmp_path):
    with pytest.raises(Unsupported, match=r"^config_path: .* holds no config\.json"):
        load(config_path=tmp_path)


@pytest.mark.config_field("load_weights_mode")
def test_other_weight_files_are_read_unless_only_safetensors_are_asked_for(pickled):
    want, got = load(), load(pickled)
    assert torch.equal(hidden_of(got), hidden_of(want))
    with pytest.raises(Unsupported, match=r"cannot be read as a Hugging Face model: .*safetensors"):
        load(pickled, only_safetensors=True)
    assert torch.equal(hidden_of(load(only_safetensors=True)), hidden_of(want))


@pytest.mark.config_field("init_device")
def test_a_model_for_the_cpu_may_be_made_there_and_never_on_a_gpu():
    assert torch.equal(hidden_of(load(init_device="cpu")), hidden_of(load(init_device="meta")))
    with pytest.raises(Unsupported, match=r"^init_device: cuda needs a GPU.*use meta or cpu$"):
        load(init_device="cuda")


@pytest.mark.config_field("init_device")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("init_device", ["cpu", "meta", "cuda"])
def test_a_gpu_is_filled_from_the_files_or_by_way_of_the_cpu(init_device):
    pytest.importorskip("accelerate")
    device = torch.device("cuda", 0)
    model = load_causal_lm(DENSE, dtype=torch.float32, device=device, build=Build(init_device=init_device))
    places = {parameter.device.type for parameter in model.parameters()}
    assert places == ({"cpu"} if init_device == "cpu" else {"cuda"})
