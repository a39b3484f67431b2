"""Full weights: making, resetting, putting to sleep and dropping the one model; what such an engine refuses."""

import shutil
from pathlib import Path

import pytest
import torch
from tests.support.engine_builders import DENSE, Driver, create, cross_entropy, loss_of, open_engine, random_data
from tests.support.full import MODEL, create_full, full_driver, full_model
from tests.support.snapshots import assert_same_state

from gradstream.engine.engine import Engine
from gradstream.shared.errors import Unsupported
from gradstream.shared.ids import ModelId, SamplerId, TenantId
from gradstream.shared.wire import (
    AdamParams,
    CreateModelDone,
    Failed,
    LoadWeights,
    OffloadModel,
    OffloadModelDone,
    OptimizerSpec,
    OptimStep,
    Payload,
    ResetModel,
    Sample,
    SamplingParams,
    SaveForSampler,
    UnloadModel,
)

STEP = OptimStep(adam=AdamParams(learning_rate=1e-2))


def failure(driver: Driver, payload: Payload, model: str = MODEL, **given: TenantId) -> Failed:
    (outcome,) = driver.run((model, payload), **given)
    assert isinstance(outcome, Failed), outcome
    return outcome


def trained(driver: Driver) -> Driver:
    driver.done(MODEL, cross_entropy(random_data([12, 7])))
    driver.step(MODEL, learning_rate=1e-2)
    driver.done(MODEL, cross_entropy(random_data([9], seed=3)))
    return driver


def test_the_card_says_what_is_trained() -> None:
    full = open_engine(is_lora=False, default_rank=7, max_row_tokens=99).card(epoch=1)
    assert (full.is_lora, full.default_rank, full.max_row_tokens) == (False, 7, 99)
    assert full.optimizer == OptimizerSpec()
    assert "weights=full master=fp32 router=frozen" in full.fingerprint
    assert open_engine().card(epoch=1).is_lora
    assert "weights=" not in open_engine().card(epoch=1).fingerprint


def test_an_adapter_is_refused_where_full_weights_are_trained() -> None:
    refused = failure(Driver(open_engine(is_lora=False)), create(), "m")
    assert refused.code == "unsupported"
    assert "use model 'default', without lora_config" in refused.message


def test_full_weights_are_refused_where_adapters_are_trained() -> None:
    driver = Driver(open_engine())
    refused = failure(driver, create_full(), "m")
    assert refused.code == "unsupported"
    assert "name lora_config.rank" in refused.message
    driver.create("m")
    assert failure(driver, OffloadModel(asleep=True), "m").code == "unsupported"


def test_a_second_model_is_refused() -> None:
    driver = full_driver()
    assert "one model at a time" in failure(driver, create_full(), "other").message
    assert "exists already" in failure(driver, create_full()).message


def test_another_tenants_jobs_do_not_reach_the_model() -> None:
    driver = full_driver()
    refused = failure(driver, STEP, tenant=TenantId("thief"))
    assert refused.code == "unknown_model"
    assert full_model(driver.engine).step == 0


@pytest.mark.parametrize(
    "payload",
    [
        Sample(path=None, prompt=b"\x05\0\0\0", params=SamplingParams(max_tokens=2)),
        SaveForSampler(sampler_id=SamplerId("s:sample:0")),
        LoadWeights(path="tinker://a:train:0/weights/x", with_optimizer=True, create=True, session_id="s"),
    ],
    ids=["sample", "save_ephemeral", "load_create"],
)
def test_what_is_for_adapters_only_is_refused_and_changes_nothing(payload: Payload) -> None:
    driver = trained(full_driver())
    (before,) = driver.engine.capture([MODEL])
    refused = failure(driver, payload, "new" if isinstance(payload, LoadWeights) else MODEL)
    assert refused.code == "unsupported", refused
    assert_same_state(before, *driver.engine.capture([MODEL]))


def test_a_model_that_is_made_again_begins_with_the_files_weights() -> None:
    driver = full_driver()
    first = driver.done(MODEL, cross_entropy(random_data([12, 7])))
    weights = driver.weights(MODEL)
    trained(driver)
    assert not torch.equal(driver.weights(MODEL), weights)
    driver.done(MODEL, UnloadModel())
    assert failure(driver, STEP).code == "unknown_model"
    assert driver.done(MODEL, create_full()) == CreateModelDone(model_id=ModelId(MODEL))
    assert torch.equal(driver.weights(MODEL), weights)
    assert driver.done(MODEL, cross_entropy(random_data([12, 7]))) == first


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_reset_forgets_the_optimizer_and_the_weights_only_if_asked(kind: str, weights: bool) -> None:
    driver = full_driver() if kind == "full" else Driver(open_engine())
    if kind == "lora":
        driver.create(MODEL)
    (fresh,) = driver.engine.capture([MODEL])
    trained(driver)
    (before,) = driver.engine.capture([MODEL])
    driver.done(MODEL, ResetModel(weights=weights))
    (after,) = driver.engine.capture([MODEL])
    assert torch.equal(after.tensors["weights"], (fresh if weights else before).tensors["weights"])
    assert (after.step, after.has_grad, after.valid_tokens) == (0, False, 0)
    assert not after.tensors["exp_avg"].any()
    assert not after.tensors["exp_avg_sq"].any()
    again = [loss_of(driver.done(MODEL, cross_entropy(random_data([8])))) for _ in range(2)]
    assert again[0] == again[1]


def test_weights_that_changed_on_disk_are_not_read_again(tmp_path: Path) -> None:
    path = Path(shutil.copytree(DENSE, tmp_path / "model"))
    driver = trained(full_driver(path))
    (before,) = driver.engine.capture([MODEL])
    (path / "config.json").write_text((path / "config.json").read_text() + "\n")
    refused = failure(driver, ResetModel(weights=True))
    assert "other weights than when this server was started" in refused.message
    assert_same_state(before, *driver.engine.capture([MODEL]))


def test_a_model_that_sleeps_refuses_all_work_and_wakes_as_it_was() -> None:
    driver = trained(full_driver())
    expected = trained(full_driver())
    (before,) = driver.engine.capture([MODEL])
    asleep = driver.done(MODEL, OffloadModel(asleep=True))
    # Host and device are one here.
    assert asleep == OffloadModelDone(model_id=ModelId(MODEL), asleep=True, bytes_moved=0)
    for payload in (cross_entropy(random_data([4])), STEP, ResetModel(weights=True), SaveForSampler(name="x")):
        refused = failure(driver, payload)
        assert (refused.code, "/wake_up" in refused.message) == ("invalid_request", True)
    driver.done(MODEL, OffloadModel(asleep=False))
    assert_same_state(before, *driver.engine.capture([MODEL]))
    assert driver.done(MODEL, STEP) == expected.done(MODEL, STEP)
    assert torch.equal(driver.weights(MODEL), expected.weights(MODEL))


def test_a_model_that_sleeps_can_be_dropped() -> None:
    driver = full_driver()
    driver.done(MODEL, OffloadModel(asleep=True))
    driver.done(MODEL, UnloadModel())
    driver.done(MODEL, create_full())
    driver.done(MODEL, cross_entropy(random_data([4])))


def test_weights_are_kept_in_bfloat16_only_beside_passes_in_bfloat16() -> None:
    with pytest.raises(Unsupported, match="master_dtype: bf16 needs a compute dtype of bfloat16"):
        open_engine(is_lora=False, master_dtype="bf16")


def test_an_engine_that_trains_adapters_has_no_flat_parameters() -> None:
    engine: Engine = open_engine()
    assert engine.state.base.flat is None
    assert not any(parameter.requires_grad for parameter in engine.state.base.causal_lm.parameters())


def test_files_that_are_gone_fail_the_job_alone(tmp_path: Path) -> None:
    path = Path(shutil.copytree(DENSE, tmp_path / "model"))
    driver = trained(full_driver(path))
    (before,) = driver.engine.capture([MODEL])
    (path / "config.json").unlink()
    refused = failure(driver, ResetModel(weights=True))
    assert refused.code == "storage_failure"
    assert_same_state(before, *driver.engine.capture([MODEL]))


def test_the_files_weights_are_read_again_as_they_were_read_at_the_start(tmp_path: Path) -> None:
    path, config_path = (Path(shutil.copytree(DENSE, tmp_path / name)) for name in ("model", "config"))
    (config_path / "config.json").write_text((path / "config.json").read_text() + "\n")
    driver = full_driver(path, config_path=config_path, load_weights_mode="safetensors")
    weights = driver.weights(MODEL)
    trained(driver)
    driver.done(MODEL, ResetModel(weights=True))
    assert torch.equal(driver.weights(MODEL), weights)
