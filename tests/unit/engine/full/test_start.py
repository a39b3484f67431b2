"""Models that begin with a checkpoint in the place of the base weights, and the checkpoint that they leave at their beginning."""

from pathlib import Path

import msgspec
import pytest
import torch
from tests.support.engine_builders import (
    DENSE,
    MOE,
    Driver,
    create,
    cross_entropy,
    engine_config,
    open_engine,
    random_data,
    randomize,
)
from tests.support.full import MODEL, create_full, full_driver
from tests.support.snapshots import assert_same_state

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import read_manifest, write_manifest
from gradstream.engine.checkpoint.start import find_start
from gradstream.engine.parallel.comm import Comm
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import (
    CreateModel,
    CreateModelDone,
    Failed,
    LoadWeights,
    OptimizerSpec,
    ResetModel,
    SaveForSampler,
    SaveWeights,
    SaveWeightsDone,
    UnloadModel,
)

URI = f"tinker://{MODEL}/weights/one"
INITIAL = "000000"
CONFIG = pytest.mark.config_field("load_checkpoint_path")


def train(driver: Driver, seed: int) -> Driver:
    driver.done(MODEL, cross_entropy(random_data([12, 7], seed=seed)))
    driver.step(MODEL, learning_rate=1e-2)
    return driver


def state_of(driver: Driver) -> ModelState:
    (state,) = driver.engine.capture([MODEL])
    return state


def saved_full(output_dir: Path, **options: object) -> ModelState:
    """A model that was trained and saved as `one`, and one more step of it in memory."""
    driver = train(full_driver(output_dir=output_dir, **options), 1)
    driver.done(MODEL, SaveWeights(name="one"))
    return state_of(driver)


def saved_adapter(output_dir: Path, *, rank: int = 4) -> ModelState:
    driver = Driver(open_engine(output_dir=output_dir, default_rank=rank))
    driver.done(MODEL, create(rank=rank))
    randomize(driver, MODEL)
    train(driver, 1).done(MODEL, SaveWeights(name="one"))
    return state_of(driver)


@CONFIG
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["directory", "uri", "xorl"])
def test_full_weights_go_on_where_the_checkpoint_stopped(tmp_path: Path, form: str, dtype: str) -> None:
    saved = saved_full(tmp_path, dtype=dtype)
    directory = parse_uri(URI).directory(tmp_path)
    path = {"directory": str(directory), "uri": URI, "xorl": f"xorl://{MODEL}/weights/one"}[form]
    driver = full_driver(output_dir=tmp_path, load_checkpoint_path=path, dtype=dtype)
    assert_same_state(saved, state_of(driver))


@CONFIG
def test_a_reset_with_weights_and_a_model_that_is_made_again_have_the_checkpoints_weights(tmp_path: Path) -> None:
    saved = saved_full(tmp_path)
    driver = train(full_driver(output_dir=tmp_path, load_checkpoint_path=URI), 2)
    driver.done(MODEL, ResetModel(weights=True))
    reset = state_of(driver)
    assert torch.equal(reset.tensors["weights"], saved.tensors["weights"])
    assert (reset.step, reset.tensors["exp_avg"].any()) == (0, False)
    train(driver, 3).done(MODEL, UnloadModel())
    driver.done(MODEL, create_full())
    assert_same_state(saved, state_of(driver))


@CONFIG
def test_another_optimizer_begins_afresh_on_the_checkpoints_weights(tmp_path: Path) -> None:
    saved = saved_full(tmp_path)
    driver = full_driver(output_dir=tmp_path, load_checkpoint_path=URI, optimizer=OptimizerSpec(type="muon"))
    state = state_of(driver)
    assert torch.equal(state.tensors["weights"], saved.tensors["weights"])
    assert state.step == 0


@CONFIG
def test_the_adapter_that_need_not_be_made_begins_with_the_checkpoint_and_others_afresh(tmp_path: Path) -> None:
    saved = saved_adapter(tmp_path)
    driver = Driver(open_engine(output_dir=tmp_path, default_rank=4, load_checkpoint_path=URI))
    for name in (MODEL, "other"):
        driver.done(name, create(rank=4))
    assert_same_state(saved, state_of(driver))
    assert not torch.equal(driver.weights("other"), saved.tensors["weights"])
    train(driver, 2).done(MODEL, ResetModel(weights=True))
    assert torch.equal(driver.weights(MODEL), saved.tensors["weights"])


@CONFIG
def test_the_fingerprint_names_what_models_begin_with(tmp_path: Path) -> None:
    saved_full(tmp_path)
    options = {"is_lora": False, "output_dir": tmp_path}
    plain, started = (open_engine(load_checkpoint_path=path, **options).card(epoch=1).fingerprint for path in ("", URI))
    start = find_start(engine_config(load_checkpoint_path=URI, **options), Comm.single())
    assert start is not None
    assert started == f"{plain} start={start.digest}"


@CONFIG
def test_a_checkpoint_that_was_replaced_since_the_start_is_not_taken(tmp_path: Path) -> None:
    saved_full(tmp_path)
    driver = Driver(open_engine(is_lora=False, output_dir=tmp_path, load_checkpoint_path=URI))
    directory = parse_uri(URI).directory(tmp_path)
    manifest = read_manifest(directory, source=URI)
    file = "__0_0.distcp"
    entry = msgspec.structs.replace(manifest.files[file], sha256="0" * 64)
    write_manifest(directory, msgspec.structs.replace(manifest, files={**manifest.files, file: entry}))
    (outcome,) = driver.run((MODEL, create_full()))
    assert isinstance(outcome, Failed)
    assert "another checkpoint than when this server was started" in outcome.message
    assert MODEL not in driver.engine.state.models


@CONFIG
def test_an_engine_does_not_start_on_what_none_of_its_models_can_begin_with(tmp_path: Path) -> None:
    saved_full(tmp_path / "full")
    saved_adapter(tmp_path / "lora", rank=4)
    train(full_driver(output_dir=tmp_path / "full"), 1).done(MODEL, SaveForSampler(name="one"))
    sampler = URI.replace("/weights/", "/sampler_weights/")
    cases = [
        ("full", {"is_lora": True}, URI, "it holds full weights"),
        ("full", {"is_lora": False}, sampler, "weights rounded for inference"),
        ("full", {"is_lora": False}, URI + "x", "there is no checkpoint"),
        ("full", {"is_lora": False}, "tinker://x", "is not a checkpoint"),
        ("lora", {"is_lora": False}, URI, "it is a LoRA adapter"),
        ("lora", {"is_lora": True, "default_rank": 8}, URI, "use lora_rank: 4"),
    ]
    for folder, options, path, sentence in cases:
        config = engine_config(output_dir=tmp_path / folder, load_checkpoint_path=path, **options)
        with pytest.raises(Unsupported, match=f"load_checkpoint_path: .*{sentence}"):
            find_start(config, Comm.single())


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_models_beginning_is_saved_when_its_creation_says_so(tmp_path: Path, kind: str) -> None:
    driver = Driver(open_engine(output_dir=tmp_path, is_lora=kind == "lora"))
    made = msgspec.structs.replace(create_full() if kind == "full" else create(rank=4), save_as=INITIAL)
    path = f"tinker://{MODEL}/weights/{INITIAL}"
    assert driver.done(MODEL, made) == CreateModelDone(model_id=MODEL, path=path)
    fresh = state_of(driver)
    train(driver, 1).done(MODEL, LoadWeights(path=path, with_optimizer=True))
    assert_same_state(fresh, state_of(driver))


def test_a_save_under_the_name_of_the_beginning_outlives_another_creation(tmp_path: Path) -> None:
    driver = Driver(open_engine(output_dir=tmp_path, is_lora=False))
    made = msgspec.structs.replace(create_full(), save_as=INITIAL)
    driver.done(MODEL, made)
    saved = train(driver, 1).done(MODEL, SaveWeights(name=INITIAL, overwrite=True))
    trained = state_of(driver)
    driver.done(MODEL, UnloadModel())
    assert driver.done(MODEL, made) == CreateModelDone(model_id=MODEL, path=None)
    assert isinstance(saved, SaveWeightsDone)
    driver.done(MODEL, LoadWeights(path=saved.path, with_optimizer=True))
    assert_same_state(trained, state_of(driver))


def test_a_model_whose_beginning_cannot_be_saved_is_not_made(tmp_path: Path) -> None:
    driver = Driver(open_engine(output_dir=tmp_path, is_lora=False, storage_limit_bytes=1000))
    made: CreateModel = msgspec.structs.replace(create_full(), save_as=INITIAL)
    (outcome,) = driver.run((MODEL, made))
    assert isinstance(outcome, Failed)
    assert outcome.code == "storage_limit"
    assert "skip_initial_checkpoint: true makes none" in outcome.message
    driver.done(MODEL, create_full())


@pytest.mark.config_field("load_weights_mode")
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_a_checkpoint_is_a_base_model_by_itself(tmp_path: Path, path: Path) -> None:
    saving = train(full_driver(path, output_dir=tmp_path), 1)
    saving.done(MODEL, SaveWeights(name="one"))
    directory = parse_uri(URI).directory(tmp_path)
    driver = full_driver(directory, load_weights_mode="dcp")
    assert torch.equal(driver.weights(MODEL), saving.weights(MODEL))
    data = random_data([12, 7])
    saving.done(MODEL, LoadWeights(path=URI, with_optimizer=False))
    assert driver.done(MODEL, cross_entropy(data)) == saving.done(MODEL, cross_entropy(data))
    train(driver, 2).done(MODEL, ResetModel(weights=True))
    assert torch.equal(driver.weights(MODEL), saving.weights(MODEL))
    lora = Driver(open_engine(directory, load_weights_mode="dcp"))
    lora.done("adapter", create(rank=4))


@pytest.mark.config_field("load_weights_mode")
def test_a_directory_without_such_files_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"load_weights_mode: dcp needs .* has no \.metadata"):
        open_engine(DENSE, load_weights_mode="dcp")
