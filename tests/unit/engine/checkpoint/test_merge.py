"""A merged model computes what base and adapter compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.support.adapters import CPU, forward_logits, noisy_adapter, save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gradstream.engine.checkpoint.huggingface import Family
from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint
from gradstream.engine.checkpoint.merge import base_sites, merge_checkpoint, merged_size_bytes
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.models.build import load_base
from gradstream.shared.errors import InvalidRequest, StorageFailure, UnknownModel
from gradstream.shared.ids import FutureId, ModelId
from gradstream.shared.wire import LoraSpec
from gradstream.worker.cli_models import app

MODELS = {
    "dense": Path("tests/models/tiny-qwen3-shakespeare"),
    "moe": Path("tests/models/tiny-qwen3-moe-shakespeare"),
}
TOKENS = torch.arange(40, 60)
SPECS = {
    "all": LoraSpec(rank=5, seed=3),
    "attention": LoraSpec(rank=3, seed=3, train_mlp=False, train_unembed=False),
    "mlp": LoraSpec(rank=4, seed=3, train_attn=False, train_unembed=False),
    "unembed": LoraSpec(rank=2, seed=3, train_attn=False, train_mlp=False),
}


def saved(adapter, root):
    place = checkpoint(ModelId("m"), CheckpointKind.SAMPLER_WEIGHTS, "a")
    save_adapter(adapter, SaveOrder(location=place, job=FutureId("m:1"), base_model="tiny"), root)
    return place.directory(root)


def logits_of(directory):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(TOKENS[None]).logits[0]


def weight_names(directory):
    names = []
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return sorted(names)


def with_dtype(source, target, dtype):
    """The model in source as files of another dtype."""
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(source / name, target)
    return target


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("model", MODELS)
def test_the_merged_model_has_the_logits_of_base_and_adapter(tmp_path, model, spec):
    path = with_dtype(MODELS[model], tmp_path / "base", torch.float32)
    base = load_base(path, device=CPU, dtype=torch.float32)
    adapter = noisy_adapter(base, spec=spec)
    out = merge_checkpoint(saved(adapter, tmp_path), path, tmp_path / "out")
    merged = logits_of(out)
    assert (merged - logits_of(path)).abs().max() > 0.05
    torch.testing.assert_close(merged, forward_logits(base, TOKENS, adapter), atol=5e-5, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_a_head_is_untied_only_when_the_adapter_changes_it(tmp_path, model):
    path = MODELS[model]
    base = load_base(path, device=CPU, dtype=torch.float32)
    original = weight_names(path)
    assert "lm_head.weight" not in original
    for spec, names in ((SPECS["attention"], original), (SPECS["unembed"], sorted([*original, "lm_head.weight"]))):
        root = tmp_path / str(spec.rank)
        out = merge_checkpoint(saved(noisy_adapter(base, spec=spec), root), path, root / "out")
        assert weight_names(out) == names
        config = json.loads((out / "config.json").read_text())
        assert config["tie_word_embeddings"] is not spec.train_unembed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_sum_is_made_in_float32_and_rounded_once_to_the_dtype_of_the_files(tmp_path, dtype):
    path = with_dtype(MODELS["dense"], tmp_path / "base", dtype)
    base = load_base(path, device=CPU, dtype=torch.float32)
    adapter = noisy_adapter(base, spec=SPECS["attention"])
    out = merge_checkpoint(saved(adapter, tmp_path), path, tmp_path / "out")
    name = "model.layers.1.self_attn.q_proj"
    with safe_open(path / "model.safetensors", framework="pt") as file:
        before = file.get_tensor(f"{name}.weight")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        after = file.get_tensor(f"{name}.weight")
    pair = adapter.named_views(adapter.weights)[name]
    exact = before.double() + adapter.scale * (pair.b.double() @ pair.a.double())
    assert after.dtype == dtype
    torch.testing.assert_close(after.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)


def test_tokenizer_and_template_come_along_and_shards_are_indexed(tmp_path):
    path = MODELS["moe"]
    base = load_base(path, device=CPU, dtype=torch.float32)
    adapter = noisy_adapter(base)
    out = merge_checkpoint(saved(adapter, tmp_path), path, tmp_path / "out", shard_size="300KB")
    assert (out / "model.safetensors.index.json").exists()
    assert len(list(out.glob("*.safetensors"))) > 1
    turn = [{"role": "user", "content": "How are you?"}]
    ours, theirs = (
        AutoTokenizer.from_pretrained(where).apply_chat_template(turn, tokenize=False) for where in (out, path)
    )
    assert ours == theirs
    assert weight_names(out) == sorted([*weight_names(path), "lm_head.weight"])


def test_the_sites_of_a_config_are_those_of_the_loaded_model():
    for path in MODELS.values():
        assert tuple(base_sites(path)) == load_base(path, device=CPU, dtype=torch.float32).sites


def test_what_cannot_be_merged_is_refused_and_leaves_nothing(tmp_path):
    base = load_base(MODELS["dense"], device=CPU, dtype=torch.float32)
    directory = saved(noisy_adapter(base), tmp_path)
    with pytest.raises(InvalidRequest, match="not of the layers"):
        merge_checkpoint(directory, MODELS["moe"], tmp_path / "out")
    with pytest.raises(UnknownModel):
        merge_checkpoint(tmp_path / "none", MODELS["dense"], tmp_path / "out")
    with pytest.raises(StorageFailure, match="exists already"):
        merge_checkpoint(directory, MODELS["dense"], tmp_path)
    damaged = directory / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageFailure, match="digest"):
        merge_checkpoint(directory, MODELS["dense"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_merges_and_says_in_a_sentence_why_it_cannot(tmp_path):
    base = load_base(MODELS["dense"], device=CPU, dtype=torch.float32)
    directory = saved(noisy_adapter(base), tmp_path)
    arguments = ["merge", str(directory), str(tmp_path / "out"), "--base", str(MODELS["dense"])]
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout.strip()) == (0, str(tmp_path / "out"))
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, again.stderr) == (
        2,
        f"error: {tmp_path / 'out'} exists already; name a directory that does not\n",
    )
    nowhere = CliRunner().invoke(app, ["merge", str(directory), str(tmp_path / "other"), "--base", "no/such/model"])
    assert nowhere.exit_code == 2
    assert nowhere.stderr.startswith("error: --base: no/such/model ")


def test_config_and_tokenizer_may_lie_apart_from_the_weights(tmp_path):
    path = MODELS["dense"]
    weights, apart = tmp_path / "weights", tmp_path / "apart"
    for directory, names in ((weights, ["model.safetensors", "generation_config.json"]), (apart, [])):
        directory.mkdir()
        for file in path.iterdir():
            if (file.name in names) is bool(names):
                shutil.copy(file, directory / file.name)
    (apart / "model.safetensors").unlink(missing_ok=True)
    base = load_base(path, device=CPU, dtype=torch.float32)
    directory = saved(noisy_adapter(base, spec=next(iter(SPECS.values()))), tmp_path)
    together = merge_checkpoint(directory, path, tmp_path / "together")
    family = Family(config_dir=apart, tokenizer_dir=apart)
    assert merged_size_bytes(weights, family=family) >= merged_size_bytes(path)
    merged = merge_checkpoint(directory, weights, tmp_path / "merged", family=family)
    assert {file.name for file in merged.iterdir()} == {file.name for file in together.iterdir()}
    torch.testing.assert_close(logits_of(merged), logits_of(together), atol=0, rtol=0)
