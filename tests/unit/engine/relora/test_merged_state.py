"""What was merged goes with the model: into checkpoints and out of them, into snapshots, samplers and exports."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.support.adapters import forward_logits
from tests.support.engine_builders import DENSE, MOE, Driver, cross_entropy, open_engine, random_data
from tests.support.relora import adapter_of, merging_driver, train
from tests.support.snapshots import assert_same_state, restore, snapshot
from transformers import AutoModelForCausalLM

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.merge import merge_checkpoint
from gradstream.engine.checkpoint.per_expert import export_per_expert
from gradstream.engine.checkpoint.shared import load_frozen
from gradstream.shared.ids import LOCAL_TENANT, ModelId, SessionId
from gradstream.shared.wire import (
    Failed,
    LoadWeights,
    ResetModel,
    RestoreSnapshotDone,
    SaveExternal,
    SaveForSampler,
    SaveWeights,
)

PATHS = pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
TOKENS = torch.arange(40, 60)
SAVED = "tinker://m/weights/a"
pytestmark = pytest.mark.config_field("merge_lora_interval")


def merged_twice(path: Path, output_dir: Path, **options: object) -> Driver:
    """A model of rank 4 after five steps, merged twice."""
    driver = merging_driver(path, output_dir=output_dir, **options)
    driver.create("m", rank=4)
    train(driver, range(5))
    return driver


def assert_same_models(left: Driver, right: Driver) -> None:
    assert_same_state(*left.engine.capture([ModelId("m")]), *right.engine.capture([ModelId("m")]))
    assert torch.equal(adapter_of(left).factors.weights, adapter_of(right).factors.weights)


@PATHS
@pytest.mark.parametrize("resets", [False, True], ids=["state kept", "state reset"])
def test_a_snapshot_goes_on_to_the_bits_of_never_having_stopped(tmp_path: Path, path: Path, resets: bool) -> None:
    whole = merged_twice(path, tmp_path, resets=resets)
    whole.done("m", cross_entropy(random_data([5], seed=9)))
    payload = snapshot(whole.engine, tmp_path)
    second = merging_driver(path, resets=resets)
    assert isinstance(restore(second.engine, payload), RestoreSnapshotDone)
    assert_same_models(whole, second)
    assert train(second, range(5, 8)) == train(whole, range(5, 8))
    assert adapter_of(second).num_merges == 4
    assert_same_models(whole, second)


@pytest.mark.parametrize("host_bytes", [1 << 30, 0], ids=["host memory", "files"])
def test_models_that_leave_the_device_in_between_have_the_bits_of_those_that_stay(
    tmp_path: Path, host_bytes: int
) -> None:
    staying = merging_driver(output_dir=tmp_path)
    leaving = merging_driver(output_dir=tmp_path, max_active_adapters=1, adapter_host_memory_bytes=host_bytes)
    losses = []
    for driver in (staying, leaving):
        for model in ("m", "n"):
            driver.create(model, rank=4)
        losses.append([train(driver, range(step, step + 1), model) for step in range(5) for model in ("m", "n")])
    assert losses[0] == losses[1]
    assert adapter_of(leaving).num_merges == 2
    assert_same_models(staying, leaving)


@PATHS
def test_a_checkpoint_goes_on_to_the_bits_of_never_having_stopped(tmp_path: Path, path: Path) -> None:
    whole = merged_twice(path, tmp_path, resets=True)
    whole.done("m", SaveWeights(name="a"))
    second = merging_driver(path, resets=True, output_dir=tmp_path)
    second.create("m", rank=4)
    second.done("m", LoadWeights(path=SAVED, with_optimizer=True))
    assert_same_models(whole, second)
    assert train(second, range(5, 7)) == train(whole, range(5, 7))
    assert_same_models(whole, second)


def test_weights_alone_bring_what_was_merged_and_begin_with_step_0(tmp_path: Path) -> None:
    driver = merged_twice(DENSE, tmp_path)
    driver.done("m", SaveWeights(name="a"))
    driver.create("n", rank=4)
    driver.done("n", LoadWeights(path=SAVED, with_optimizer=False))
    driver.done("new", LoadWeights(path=SAVED, with_optimizer=False, create=True, session_id=SessionId("s")))
    for model in ("n", "new"):
        adapter = adapter_of(driver, model)
        assert torch.equal(adapter.factors.weights, adapter_of(driver).factors.weights)
        assert (adapter.step, adapter.num_merges, adapter.exp_avg.any()) == (0, 2, False)
    train(driver, range(2), "n")
    assert adapter_of(driver, "n").num_merges == 3


def test_a_checkpoint_without_merges_takes_the_place_of_everything_merged(tmp_path: Path) -> None:
    driver = merging_driver(output_dir=tmp_path)
    driver.create("m", rank=4)
    driver.done("m", SaveWeights(name="a"))
    before = adapter_of(driver).weights.clone()
    train(driver, range(3))
    driver.done("m", LoadWeights(path=SAVED, with_optimizer=True))
    adapter = adapter_of(driver)
    assert (adapter.num_merges, adapter.frozen_factors()) == (0, None)
    assert torch.equal(adapter.weights, before)
    assert adapter.factors.weights is adapter.weights


def test_a_server_that_does_not_merge_loads_samples_and_trains_on(tmp_path: Path) -> None:
    driver = merged_twice(DENSE, tmp_path)
    driver.done("m", SaveWeights(name="a"))
    plain = Driver(open_engine(output_dir=tmp_path))
    plain.create("m", rank=4)
    plain.done("m", LoadWeights(path=SAVED, with_optimizer=True))
    train(plain, range(5, 8))
    assert adapter_of(plain).num_merges == 2
    assert torch.equal(adapter_of(plain).frozen_factors(), adapter_of(driver).frozen_factors())
    assert not torch.equal(adapter_of(plain).weights, adapter_of(driver).weights)


@pytest.mark.config_field("max_merged_lora_rank")
def test_a_checkpoint_of_a_higher_rank_than_the_servers_is_refused(tmp_path: Path) -> None:
    merged_twice(DENSE, tmp_path).done("m", SaveWeights(name="a"))
    small = merging_driver(max_rank=11, output_dir=tmp_path)
    small.create("m", rank=4)
    (failed,) = small.run(("m", LoadWeights(path=SAVED, with_optimizer=False)))
    assert isinstance(failed, Failed)
    assert "has LoRA rank 12 with its 2 merges; this server allows up to 11 (max_merged_lora_rank)" in failed.message
    assert adapter_of(small).num_merges == 0


def test_a_reset_with_weights_drops_what_was_merged_and_one_without_keeps_it(tmp_path: Path) -> None:
    driver = merged_twice(DENSE, tmp_path, resets=True)
    frozen = adapter_of(driver).frozen_factors()
    driver.done("m", ResetModel(weights=False))
    assert torch.equal(adapter_of(driver).frozen_factors(), frozen)
    assert (adapter_of(driver).step, adapter_of(driver).optim_began) == (0, 0)
    driver.done("m", ResetModel(weights=True))
    driver.create("fresh", rank=4)
    assert adapter_of(driver).frozen_factors() is None
    assert torch.equal(adapter_of(driver).weights, adapter_of(driver, "fresh").weights)


@PATHS
def test_a_sampler_has_all_factors_in_memory_and_from_its_files(tmp_path: Path, path: Path) -> None:
    driver = merged_twice(path, tmp_path)
    done = driver.done("m", SaveForSampler(name="s"))
    state, adapter = driver.engine.state, adapter_of(driver)
    held = state.samplers.get(done.path, LOCAL_TENANT)
    read = load_frozen(state, parse_uri(done.path), tenant=LOCAL_TENANT)
    for frozen in (held, read):
        assert frozen.layout.rank == 12
        assert torch.equal(frozen.weights, adapter.factors.weights)
    want = forward_logits(state.base, TOKENS, adapter)
    assert torch.equal(forward_logits(state.base, TOKENS, read), want)
    train(driver, range(5, 6))
    assert torch.equal(forward_logits(state.base, TOKENS, held), want)


@PATHS
def test_peft_opens_a_merged_adapter_of_the_whole_rank_and_computes_the_same_logits(tmp_path: Path, path: Path) -> None:
    driver = merged_twice(path, tmp_path)
    directory = parse_uri(driver.done("m", SaveExternal(name="e")).path).directory(tmp_path)
    assert json.loads((directory / "adapter_config.json").read_text())["r"] == 12
    plain = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad(), warnings.catch_warnings():
        # peft warns that the embedding is tied to an adapted head, which is what is meant here.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        unchanged = plain(TOKENS[None]).logits[0]
        theirs = PeftModel.from_pretrained(plain, directory)(TOKENS[None]).logits[0]
    assert (theirs - unchanged).abs().max() > 0.01
    ours = forward_logits(driver.engine.state.base, TOKENS, adapter_of(driver))
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=0)


@PATHS
def test_a_model_with_a_merged_adapter_in_its_weights_computes_the_same(tmp_path: Path, path: Path) -> None:
    driver = merged_twice(path, tmp_path)
    directory = parse_uri(driver.done("m", SaveExternal(name="e")).path).directory(tmp_path)
    out = merge_checkpoint(directory, path, tmp_path / "whole")
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(TOKENS[None]).logits[0]
    ours = forward_logits(driver.engine.state.base, TOKENS, adapter_of(driver))
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=0)


def test_an_export_by_expert_has_the_whole_rank(tmp_path: Path) -> None:
    driver = merged_twice(MOE, tmp_path)
    directory = parse_uri(driver.done("m", SaveExternal(name="e")).path).directory(tmp_path)
    out = export_per_expert(directory, tmp_path / "out")
    factors = load_file(out / "adapter_model.safetensors")
    adapter = adapter_of(driver)
    site = next(site for site in adapter.factors.layout.sites if site.name.endswith("mlp.experts.down_proj"))
    stem = f"base_model.model.{site.name.removesuffix('down_proj')}2.down_proj"
    pair = adapter.factors.pairs[site.index]
    assert torch.equal(factors[f"{stem}.lora_A.weight"], pair.a[2])
    assert torch.equal(factors[f"{stem}.lora_B.weight"], pair.b[2])
