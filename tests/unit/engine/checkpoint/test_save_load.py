import errno
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests.support.adapters import CPU, forward_logits, noisy_adapter, save_adapter
from transformers import AutoModelForCausalLM

from gradstream.engine.adapters.adapter import Owner, new_adapter
from gradstream.engine.checkpoint.load import LoadOrder, load_content
from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint, ephemeral
from gradstream.engine.checkpoint.manifest import MANIFEST_FILE
from gradstream.engine.checkpoint.save import OPTIMIZER_FILE, SaveOrder
from gradstream.engine.checkpoint.snapshot import restore
from gradstream.engine.models.build import load_base
from gradstream.shared.clock import ManualClock
from gradstream.shared.errors import CheckpointExists, InvalidRequest, StorageFailure, UnknownModel
from gradstream.shared.ids import LOCAL_TENANT, FutureId, ModelId, SamplerId, SessionId, TenantId
from gradstream.shared.wire import LoraSpec

DENSE = Path("tests/models/tiny-qwen3-shakespeare")
MOE = Path("tests/models/tiny-qwen3-moe-shakespeare")
NAME = "tiny"
TOKENS = torch.arange(40, 60)


@pytest.fixture(scope="module")
def dense():
    return load_base(DENSE, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def moe():
    return load_base(MOE, device=CPU, dtype=torch.float32)


def place(name="a", kind=CheckpointKind.WEIGHTS, model="s:train:0"):
    return checkpoint(ModelId(model), kind, name)


def save(adapter, root, location=None, *, job="s:train:0:9", **options):
    order = SaveOrder(location=location or place(), job=FutureId(job), base_model=NAME, **options)
    save_adapter(adapter, order, root, clock=ManualClock(wall_ms=123))
    return order.location.directory(root)


def load(base, root, location=None, **options):
    fields = {"tenant": LOCAL_TENANT, "base_models": ["main", NAME], "max_lora_rank": 64, **options}
    return load_content(LoadOrder(location=location or place(), base_sites=base.sites, **fields), root)


SPECS = {
    "all": LoraSpec(rank=5, seed=3),
    "attention": LoraSpec(rank=3, seed=3, train_mlp=False, train_unembed=False),
    "mlp": LoraSpec(rank=4, seed=3, train_attn=False, train_unembed=False),
    "unembed": LoraSpec(rank=2, seed=3, train_attn=False, train_mlp=False),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("model_dir", [DENSE, MOE], ids=["dense", "moe"])
def test_peft_opens_a_saved_adapter_and_computes_the_same_logits(request, tmp_path, model_dir, spec):
    base = request.getfixturevalue("dense" if model_dir == DENSE else "moe")
    adapter = noisy_adapter(base, spec=spec)
    directory = save(adapter, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad(), warnings.catch_warnings():
        # peft warns that the embedding is tied to an adapted head, which is what is meant here.
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        unchanged = plain(TOKENS[None]).logits[0]
        theirs = PeftModel.from_pretrained(plain, directory)(TOKENS[None]).logits[0]
    ours = forward_logits(base, TOKENS, adapter)
    assert (theirs - unchanged).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_loaded_adapter_has_every_bit_of_the_saved_one(request, tmp_path, model):
    base = request.getfixturevalue(model)
    saved = noisy_adapter(base)
    save(saved, tmp_path)
    content = load(base, tmp_path, with_optimizer=True)
    fresh = noisy_adapter(base, model="s:train:1", alpha=7.0, noise_seed=2)
    fresh.grad.fill_(1.0)
    fresh.has_grad = True
    restore(fresh, content)
    for name in ("weights", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(fresh, name), getattr(saved, name)), name
    assert (fresh.step, fresh.scale, fresh.has_grad) == (3, saved.scale, False)
    assert not fresh.grad.any()


def test_weights_only_starts_a_fresh_optimizer(dense, tmp_path):
    saved = noisy_adapter(dense)
    save(saved, tmp_path)
    fresh = noisy_adapter(dense, noise_seed=2)
    restore(fresh, load(dense, tmp_path))
    assert torch.equal(fresh.weights, saved.weights)
    assert not fresh.exp_avg.any()
    assert not fresh.exp_avg_sq.any()
    assert fresh.step == 0


def test_the_manifest_says_what_was_saved(dense, tmp_path):
    directory = save(noisy_adapter(dense), tmp_path, ttl_seconds=60, user_metadata={"a": "b"})
    manifest = json.loads((directory / MANIFEST_FILE).read_text())
    files = manifest.pop("files")
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", OPTIMIZER_FILE}
    assert manifest == {
        "version": 1,
        "kind": "weights",
        "source": "tinker://s:train:0/weights/a",
        "job": "s:train:0:9",
        "model": "s:train:0",
        "tenant": "local",
        "base_model": NAME,
        "lora": {"rank": 5, "seed": 3},
        "scale": 24.0 / 5,
        "step": 3,
        "has_optimizer": True,
        "created_ms": 123,
        "ttl_seconds": 60,
        "user_metadata": {"a": "b"},
        "optimizer": {},
        "full": None,
        "num_merges": 0,
        "optim_began": 0,
    }


def test_sampler_weights_have_no_optimizer_and_train_on_as_weights_only(dense, tmp_path):
    location = place(kind=CheckpointKind.SAMPLER_WEIGHTS)
    directory = save(noisy_adapter(dense), tmp_path, location)
    assert not (directory / OPTIMIZER_FILE).exists()
    assert not load(dense, tmp_path, location).has_optimizer
    with pytest.raises(InvalidRequest, match="no optimizer state"):
        load(dense, tmp_path, location, with_optimizer=True)


def test_a_taken_name_is_refused_and_keeps_its_content(dense, tmp_path):
    first = noisy_adapter(dense)
    save(first, tmp_path)
    with pytest.raises(CheckpointExists, match="tinker://s:train:0/weights/a exists already"):
        save(noisy_adapter(dense, noise_seed=2), tmp_path, job="s:train:0:10")
    fresh = noisy_adapter(dense, noise_seed=3)
    restore(fresh, load(dense, tmp_path))
    assert torch.equal(fresh.weights, first.weights)


def test_the_same_job_run_again_finds_its_own_checkpoint(dense, tmp_path):
    save(noisy_adapter(dense), tmp_path)
    save(noisy_adapter(dense), tmp_path)


def test_overwrite_replaces_the_checkpoint(dense, tmp_path):
    save(noisy_adapter(dense), tmp_path)
    second = noisy_adapter(dense, noise_seed=2)
    directory = save(second, tmp_path, job="s:train:0:10", overwrite=True)
    fresh = noisy_adapter(dense, noise_seed=3)
    restore(fresh, load(dense, tmp_path))
    assert torch.equal(fresh.weights, second.weights)
    assert [path.name for path in directory.parent.iterdir()] == ["a"]


def test_a_samplers_own_weights_are_replaced_when_its_job_runs_again(dense, tmp_path):
    location = ephemeral(SamplerId("s:sample:0"))
    save(noisy_adapter(dense), tmp_path, location)
    save(noisy_adapter(dense), tmp_path, location, job="other")
    assert load(dense, tmp_path, location).manifest.kind == "ephemeral"


def test_another_tenant_cannot_replace_a_samplers_weights(dense, tmp_path):
    location = ephemeral(SamplerId("s:sample:0"))
    save(noisy_adapter(dense), tmp_path, location)
    with pytest.raises(CheckpointExists, match="sampler s:sample:0 exists already"):
        save(noisy_adapter(dense, tenant=TenantId("other")), tmp_path, location)
    assert load(dense, tmp_path, location).manifest.tenant == LOCAL_TENANT


def test_a_full_disk_fails_the_save_and_leaves_no_half_checkpoint(dense, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailure, match="the disk is full"):
        save(noisy_adapter(dense), tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.*"))
    with pytest.raises(UnknownModel):
        load(dense, tmp_path)


def test_a_root_that_is_no_directory_fails_the_save(dense, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure, match="cannot write"):
        save(noisy_adapter(dense), tmp_path / "file")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", OPTIMIZER_FILE, "adapter_config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_nothing_is_loaded(dense, tmp_path, name, damage):
    path = save(noisy_adapter(dense), tmp_path) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flip":
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "remove":
            path.unlink()
    with pytest.raises(StorageFailure, match=f"tinker://s:train:0/weights/a is damaged: {name}"):
        load(dense, tmp_path)


def test_a_directory_without_manifest_is_no_checkpoint(dense, tmp_path):
    (save(noisy_adapter(dense), tmp_path) / MANIFEST_FILE).unlink()
    with pytest.raises(UnknownModel, match="there is no checkpoint"):
        load(dense, tmp_path)


def test_a_newer_format_is_refused(dense, tmp_path):
    path = save(noisy_adapter(dense), tmp_path) / MANIFEST_FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(StorageFailure, match="format version 2; this server reads version 1"):
        load(dense, tmp_path)


def test_another_tenants_checkpoint_does_not_exist(dense, tmp_path):
    save(noisy_adapter(dense, tenant=TenantId("other")), tmp_path)
    with pytest.raises(UnknownModel, match="there is no checkpoint"):
        load(dense, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_models": ["another"]}, "was trained on 'tiny'; this server runs 'another'"),
        ({"max_lora_rank": 4}, "LoRA rank 5; this server allows up to 4"),
        ({"expected": LoraSpec(rank=8)}, "has rank 5.*the model has rank 8"),
        ({"expected": LoraSpec(rank=5, train_mlp=False)}, "train_mlp True.*train_mlp False"),
    ],
    ids=["another base", "too high a rank", "another rank", "other layers"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_sides(dense, tmp_path, options, message):
    save(noisy_adapter(dense), tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        load(dense, tmp_path, **options)


def test_a_checkpoint_of_another_architecture_under_the_same_name_is_refused(dense, moe, tmp_path):
    save(noisy_adapter(moe), tmp_path)
    with pytest.raises(InvalidRequest, match="not of the layers"):
        load(dense, tmp_path)


def test_a_seed_that_the_client_left_out_is_in_the_checkpoint(dense, tmp_path):
    owner = Owner(model_id=ModelId("s:train:0"), tenant=LOCAL_TENANT, session_id=SessionId("s"), spec=LoraSpec(rank=2))
    adapter = new_adapter(owner, base_sites=dense.sites, lora_alpha=32.0, engine_seed=4, device=CPU)
    save(adapter, tmp_path)
    assert load(dense, tmp_path).manifest.lora.seed is not None
