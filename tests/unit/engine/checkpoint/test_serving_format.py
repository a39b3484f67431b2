"""The names and shapes that inference servers read: a module of the checkpoint files, lora_A and lora_B, and a peft config."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.support.adapters import CPU, noisy_adapter, save_adapter
from typer.testing import CliRunner

from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint
from gradstream.engine.checkpoint.per_expert import export_per_expert
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.models.build import load_base
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.wire import LoraSpec
from gradstream.worker.cli_models import app

MODELS = {
    "dense": Path("tests/models/tiny-qwen3-shakespeare"),
    "moe": Path("tests/models/tiny-qwen3-moe-shakespeare"),
}
RANK = 5
NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def saved(model, root):
    base = load_base(MODELS[model], device=CPU, dtype=torch.float32)
    adapter = noisy_adapter(base, spec=LoraSpec(rank=RANK, seed=3))
    place = checkpoint(ModelId("m"), CheckpointKind.EXTERNAL_WEIGHTS, "a")
    save_adapter(adapter, SaveOrder(location=place, job=FutureId("m:1"), base_model="tiny"), root)
    return adapter, place.directory(root)


def base_shapes(model):
    """The shape of every weight as the base model's files name it; the head is the embedding, by another name."""
    with safe_open(MODELS[model] / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    return {**shapes, "lm_head.weight": shapes["model.embed_tokens.weight"]}


@pytest.mark.parametrize("model", MODELS)
def test_every_factor_belongs_to_a_weight_of_the_base_models_files_and_fits_it(tmp_path, model):
    _, directory = saved(model, tmp_path)
    out = export_per_expert(directory, tmp_path / "out")
    tensors, shapes = load_file(out / "adapter_model.safetensors"), base_shapes(model)
    config = json.loads((out / "adapter_config.json").read_text())
    modules = set()
    for name, tensor in tensors.items():
        module, part = NAME.fullmatch(name).groups()
        modules.add(module)
        out_features, in_features = shapes[f"{module}.weight"]
        assert tuple(tensor.shape) == ((RANK, in_features) if part == "A" else (out_features, RANK)), name
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    assert {name.rpartition(".")[2] for name in modules} == projections == set(config["target_modules"])
    assert modules == {name.removesuffix(".weight") for name in shapes if name.split(".")[-2] in projections}
    assert len(tensors) == 2 * len(modules)
    assert not config.get("target_parameters")
    assert (config["peft_type"], config["r"], config["bias"]) == ("LORA", RANK, "none")


def test_a_dense_adapter_is_served_from_the_checkpoints_own_files(tmp_path):
    _, directory = saved("dense", tmp_path)
    out = export_per_expert(directory, tmp_path / "out")
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (directory, out))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_each_experts_factors_give_the_change_that_was_trained(tmp_path):
    adapter, directory = saved("moe", tmp_path)
    tensors = load_file(export_per_expert(directory, tmp_path / "out") / "adapter_model.safetensors")

    def change(module):
        stem = f"base_model.model.{module}"
        return tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]

    for site, pair in adapter.named_views(adapter.weights).items():
        if ".experts." not in site:
            continue
        experts, _, fused = site.rpartition(".")
        for number, (a, b) in enumerate(zip(pair.a, pair.b, strict=True)):
            parts = ("gate_proj", "up_proj") if fused == "gate_up_proj" else ("down_proj",)
            found = torch.cat([change(f"{experts}.{number}.{part}") for part in parts])
            torch.testing.assert_close(found, b @ a, atol=1e-6, rtol=1e-5)


def test_the_command_exports_and_refuses_to_replace(tmp_path):
    _, directory = saved("moe", tmp_path)
    done = CliRunner().invoke(app, ["export-adapter", str(directory), str(tmp_path / "out")])
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "out"))
    with pytest.raises(StorageFailure, match="exists already"):
        export_per_expert(directory, tmp_path / "out")
