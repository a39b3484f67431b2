"""Full weights for inference: a Hugging Face directory that transformers opens, with the trained weights rounded to bfloat16."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, random_data
from tests.support.full import MODEL, full_driver, full_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradstream.engine.checkpoint.full_save import huggingface_files
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from gradstream.engine.checkpoint.merge import merge_checkpoint
from gradstream.engine.checkpoint.per_expert import export_per_expert
from gradstream.shared.errors import InvalidRequest, StorageFailure
from gradstream.shared.wire import Failed, LoadWeights, SaveExternal, SaveExternalDone, SaveForSampler, SaveWeights

URI = f"tinker://{MODEL}/sampler_weights/one"
TOKENS = torch.arange(40, 70)[None]


def trained(path: Path, output_dir: Path, **options: object) -> Driver:
    driver = full_driver(path, output_dir=output_dir, **options)
    for seed in (1, 2):
        driver.done(MODEL, cross_entropy(random_data([12, 7], seed=seed)))
        driver.step(MODEL, learning_rate=1e-2)
    return driver


def rounded(driver: Driver, path: Path) -> torch.nn.Module:
    """transformers' own model of the files, with the trained weights rounded to bfloat16 put into it."""
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    trained = full_model(driver.engine)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in trained.layout.named_views(trained.weights).items():
            named[name].copy_(value)
    return model.float()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def opened(directory: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert model.dtype == torch.bfloat16
    return model.float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_transformers_computes_the_logits_of_the_rounded_weights(tmp_path: Path, path: Path, dtype: str) -> None:
    driver = trained(path, tmp_path, dtype=dtype)
    driver.done(MODEL, SaveForSampler(name="one"))
    directory = parse_uri(URI).directory(tmp_path)
    expected = logits(rounded(driver, path))
    assert torch.equal(logits(opened(directory)), expected)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))).abs().max() > 0.01
    verify(directory, read_manifest(directory, source=URI), source=URI)


def test_the_directory_has_the_names_of_the_familys_files_with_tokenizer_and_generation_config(tmp_path: Path) -> None:
    trained(MOE, tmp_path).done(MODEL, SaveForSampler(name="one"))
    directory = parse_uri(URI).directory(tmp_path)
    with (
        safe_open(MOE / "model.safetensors", "pt") as base,
        safe_open(directory / "model.safetensors", "pt") as saved,
    ):
        assert set(base.keys()) == set(saved.keys())
        assert all(base.get_tensor(name).shape == saved.get_tensor(name).shape for name in base.keys())  # noqa: SIM118
    copied = {path.name for path in MOE.iterdir()} - {"config.json", "model.safetensors"}
    for name in copied:
        assert (directory / name).read_bytes() == (MOE / name).read_bytes()
    assert {path.name for path in directory.iterdir()} == {path.name for path in MOE.iterdir()} | {MANIFEST_FILE}
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(directory)("to be").input_ids


def test_large_models_are_split_into_shards_that_open_as_one(tmp_path: Path) -> None:
    driver = trained(MOE, tmp_path)
    directory = tmp_path / "sharded"
    directory.mkdir()
    replace(huggingface_files(driver.engine.state, full_model(driver.engine)), shard_bytes=150_000).write(directory)
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((directory / name).stat().st_size < 300_000 for name in shards)
    assert torch.equal(logits(opened(directory)), logits(rounded(driver, MOE)))


def test_a_download_is_the_same_directory_and_its_size_is_told(tmp_path: Path) -> None:
    driver = trained(DENSE, tmp_path)
    driver.done(MODEL, SaveForSampler(name="one"))
    done = driver.done(MODEL, SaveExternal(name="one"))
    assert isinstance(done, SaveExternalDone)
    external, sampler = (read_manifest(parse_uri(uri).directory(tmp_path), source=uri) for uri in (done.path, URI))
    assert external.files == sampler.files
    assert done.size_bytes == external.size_bytes


def test_a_save_counts_itself_before_it_is_written(tmp_path: Path) -> None:
    driver = trained(DENSE, tmp_path / "free")
    driver.done(MODEL, SaveForSampler(name="one"))
    directory = parse_uri(URI).directory(tmp_path / "free")
    size = sum(path.stat().st_size for path in directory.iterdir())
    for limit, fits in ((size - 1, False), (int(1.3 * size), True)):
        (outcome,) = trained(DENSE, tmp_path / str(limit), storage_limit_bytes=limit).run(
            (MODEL, SaveForSampler(name="one"))
        )
        assert (isinstance(outcome, Failed) and outcome.code == "storage_limit") is not fits


def test_rounded_weights_are_not_trained_on(tmp_path: Path) -> None:
    driver = trained(DENSE, tmp_path)
    driver.done(MODEL, SaveForSampler(name="one"))
    (outcome,) = driver.run((MODEL, LoadWeights(path=URI, with_optimizer=False)))
    assert isinstance(outcome, Failed)
    assert "rounded for inference" in outcome.message


@pytest.mark.parametrize("saved", ["dcp", "torch", "sampler"])
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_an_export_of_any_checkpoint_is_the_same_model(tmp_path: Path, path: Path, saved: str) -> None:
    driver = trained(path, tmp_path, ckpt_manager="torch" if saved == "torch" else "dcp")
    uri = URI
    if saved == "sampler":
        driver.done(MODEL, SaveForSampler(name="one"))
    else:
        driver.done(MODEL, SaveWeights(name="one"))
        uri = URI.replace("/sampler_weights/", "/weights/")
    out = merge_checkpoint(parse_uri(uri).directory(tmp_path), path, tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {file.name for file in path.iterdir()}
    assert torch.equal(logits(opened(out)), logits(rounded(driver, path)))
    with pytest.raises(StorageFailure, match="out exists already"):
        merge_checkpoint(parse_uri(uri).directory(tmp_path), path, out)


def test_full_weights_are_no_adapter_to_export(tmp_path: Path) -> None:
    trained(DENSE, tmp_path).done(MODEL, SaveForSampler(name="one"))
    with pytest.raises(InvalidRequest, match="holds full weights, and this is for LoRA adapters only"):
        export_per_expert(parse_uri(URI).directory(tmp_path), tmp_path / "out")
