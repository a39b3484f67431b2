"""Checkpoints of full weights: every bit comes back in both formats, plain torch reads them, and what does not fit is refused."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.support.engine_builders import DENSE, MOE, Driver, create, cross_entropy, open_engine, random_data
from tests.support.full import MODEL, create_full, full_driver, full_model
from tests.support.snapshots import assert_same_state
from tests.support.trained import assert_same_bits

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import read_manifest
from gradstream.engine.snapshot.state import ModelState
from gradstream.shared.ids import TenantId
from gradstream.shared.wire import Failed, LoadWeights, OptimizerSpec, SaveWeights

URI = f"tinker://{MODEL}/weights/one"
FORMATS = ["dcp", "torch"]


def train(driver: Driver, *seeds: int) -> Driver:
    for seed in seeds:
        driver.done(MODEL, cross_entropy(random_data([12, 7], seed=seed)))
        driver.step(MODEL, learning_rate=1e-2)
    return driver


def state_of(driver: Driver) -> ModelState:
    (state,) = driver.engine.capture([MODEL])
    return state


def load(*, path: str = URI, with_optimizer: bool = True) -> LoadWeights:
    return LoadWeights(path=path, with_optimizer=with_optimizer)


def refusal(driver: Driver, **given: object) -> Failed:
    before = state_of(driver)
    tenant = given.pop("tenant", None)
    options = {} if tenant is None else {"tenant": tenant}
    (outcome,) = driver.run((MODEL, load(**given)), **options)  # type: ignore[arg-type]
    assert isinstance(outcome, Failed), outcome
    assert_same_state(before, state_of(driver))
    return outcome


def directory(output_dir: Path, uri: str = URI) -> Path:
    return parse_uri(uri).directory(output_dir)


def torch_reads(where: Path, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by torch's own loaders."""
    if (where / "checkpoint.pt").exists():
        content = torch.load(where / "checkpoint.pt", weights_only=True)
        flat = {f"{part}.{name}": value for part in ("model", "optim") for name, value in content[part].items()}
        return {name: flat[name] for name in names}
    found = {name: torch.full_like(value, 7) for name, value in names.items()}
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.load(found, checkpoint_id=where)
    return found


VARIANTS = {
    "float32": {},
    "bfloat16_with_master": {"dtype": "bfloat16"},
    "bfloat16_alone": {
        "dtype": "bfloat16",
        "master_dtype": "bf16",
        "optimizer": OptimizerSpec(type="anyprecision_adamw", dtype="bf16"),
    },
    "muon": {"optimizer": OptimizerSpec(type="muon")},
}


@pytest.mark.config_field("ckpt_manager")
@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_bit_comes_back_and_training_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, format_name: str, variant: str
) -> None:
    options = {"output_dir": tmp_path, "reduction": "token_mean", **VARIANTS[variant]}
    first = train(full_driver(ckpt_manager=format_name, **options), 1, 2)
    first.done(MODEL, SaveWeights(name="one"))
    saved = state_of(first)
    # Whatever the format of this server's own saves is.
    other = FORMATS[1 - FORMATS.index(format_name)]
    second = train(full_driver(ckpt_manager=other, **options), 9)
    second.done(MODEL, cross_entropy(random_data([5])))
    second.done(MODEL, load())
    assert_same_state(saved, state_of(second))
    assert_same_state(state_of(train(first, 3)), state_of(train(second, 3)))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("path", [DENSE, MOE], ids=["dense", "moe"])
def test_plain_torch_finds_each_parameter_under_its_name(tmp_path: Path, format_name: str, path: Path) -> None:
    driver = train(full_driver(path, output_dir=tmp_path, ckpt_manager=format_name), 1)
    driver.done(MODEL, SaveWeights(name="one"))
    model = full_model(driver.engine)
    names = model.layout.named_views(model.weights)
    wanted = {f"model.{name}": value for name, value in names.items()}
    wanted |= {f"model.{name}": value.detach() for name, value in driver.engine.state.flat.frozen.items()}
    for part in ("exp_avg", "exp_avg_sq"):
        views = model.layout.named_views(model.optim[part])
        wanted |= {f"optim.{part}.{name}": value for name, value in views.items()}
    assert ("model.model.layers.0.mlp.gate.weight" in wanted) == (path == MOE)
    assert_same_bits(torch_reads(directory(tmp_path), wanted), wanted)


@pytest.mark.parametrize("format_name", FORMATS)
def test_equal_models_make_equal_files_and_no_path_is_in_them(tmp_path: Path, format_name: str) -> None:
    driver = train(full_driver(output_dir=tmp_path, ckpt_manager=format_name), 1)
    for name in ("one", "two"):
        driver.done(MODEL, SaveWeights(name=name))
    one, two = (
        read_manifest(directory(tmp_path, f"tinker://{MODEL}/weights/{name}"), source=name) for name in ("one", "two")
    )
    assert one.files == two.files
    for name in one.files:
        assert str(tmp_path).encode() not in (directory(tmp_path) / name).read_bytes()


def test_the_manifest_says_what_was_saved(tmp_path: Path) -> None:
    spec = OptimizerSpec(dtype="bf16")
    driver = train(full_driver(output_dir=tmp_path, optimizer=spec, dtype="bfloat16"), 1, 2)
    driver.done(MODEL, SaveWeights(name="one"))
    manifest = read_manifest(directory(tmp_path), source=URI)
    assert (manifest.model, manifest.step, manifest.has_optimizer, manifest.lora) == (MODEL, 2, True, None)
    assert manifest.optimizer == spec
    assert manifest.full is not None
    assert (manifest.full.format, manifest.full.dtype) == ("dcp", "float32")
    assert manifest.full.architecture == "Qwen3ForCausalLM"


def test_without_the_optimizer_its_state_and_step_start_fresh(tmp_path: Path) -> None:
    driver = train(full_driver(output_dir=tmp_path), 1)
    driver.done(MODEL, SaveWeights(name="one"))
    weights = driver.weights(MODEL)
    train(driver, 2)
    driver.done(MODEL, load(with_optimizer=False))
    state = state_of(driver)
    assert torch.equal(state.tensors["weights"], weights)
    assert (state.step, state.has_grad) == (0, False)
    assert not any(state.tensors[name].any() for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("format_name", FORMATS)
def test_before_the_first_step_no_zeros_are_saved_and_the_state_comes_back_as_zero(
    tmp_path: Path, format_name: str
) -> None:
    driver = full_driver(output_dir=tmp_path, ckpt_manager=format_name)
    fresh = state_of(driver)
    driver.done(MODEL, SaveWeights(name="one"))
    size = read_manifest(directory(tmp_path), source=URI).size_bytes
    assert size < 1.5 * driver.weights(MODEL).nbytes
    train(driver, 1).done(MODEL, load())
    assert_same_state(fresh, state_of(driver))


REFUSED = {
    "optimizer": (
        {"optimizer": OptimizerSpec(type="sgd")},
        {},
        "holds the state of sgd (state in fp32, momentum 0); this model",
    ),
    "state": (
        {"optimizer": OptimizerSpec(dtype="bf16")},
        {},
        "adamw (state in bf16); this model trains by adamw (state in fp32)",
    ),
    "architecture": ({"path": MOE}, {}, "lacks 'model.layers.0.mlp.gate_proj.weight', so it is of another model"),
    "router": (
        {"path": MOE, "freeze_router": False},
        {"path": MOE},
        "'model.layers.0.mlp.gate.weight' is another than",
    ),
    "base": ({"model_name": "other"}, {}, "was trained on 'other'; this server runs 'tiny'"),
    "precision": ({"dtype": "bfloat16"}, {"dtype": "bfloat16", "master_dtype": "bf16"}, "set master_dtype: fp32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path, case: str) -> None:
    saved_with, loaded_with, sentence = REFUSED[case]
    name = saved_with.get("model_name", "tiny")
    saving = Driver(open_engine(**{"is_lora": False, "output_dir": tmp_path, **without_optimizer(saved_with)}))
    made = create_full(optimizer=saved_with.get("optimizer"))
    saving.done(MODEL, type(made)(session_id=made.session_id, base_model=name, optimizer=made.optimizer))
    train(saving, 1).done(MODEL, SaveWeights(name="one"))
    driver = train(full_driver(**{"output_dir": tmp_path, **loaded_with}), 2)
    refused = refusal(driver)
    assert refused.code == "invalid_request"
    assert sentence in refused.message


def without_optimizer(options: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in options.items() if name != "optimizer"}


def test_what_is_not_there_is_damaged_or_belongs_to_others_is_refused(tmp_path: Path) -> None:
    driver = train(full_driver(output_dir=tmp_path), 1)
    driver.done(MODEL, SaveWeights(name="one"))
    assert refusal(driver, path=f"tinker://{MODEL}/weights/none").code == "unknown_model"
    (outcome,) = driver.run((MODEL, load()), tenant=TenantId("thief"))
    assert isinstance(outcome, Failed)
    assert outcome.code == "unknown_model"
    damaged = directory(tmp_path) / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused = refusal(driver)
    assert (refused.code, "__0_0.distcp does not have the digest" in refused.message) == ("storage_failure", True)


def test_adapters_and_full_weights_do_not_load_each_other(tmp_path: Path) -> None:
    full = train(full_driver(output_dir=tmp_path), 1)
    full.done(MODEL, SaveWeights(name="one"))
    lora = Driver(open_engine(output_dir=tmp_path))
    lora.done(MODEL, create(rank=4))
    lora.done(MODEL, SaveWeights(name="adapter"))
    refused = refusal(lora)
    assert "holds full weights; this server trains LoRA adapters" in refused.message
    refused = refusal(full, path=f"tinker://{MODEL}/weights/adapter")
    assert "is a LoRA adapter; this server trains the full weights" in refused.message


def test_a_save_counts_itself_before_it_is_written(tmp_path: Path) -> None:
    for format_name in FORMATS:
        driver = train(full_driver(output_dir=tmp_path / format_name, ckpt_manager=format_name), 1)
        driver.done(MODEL, SaveWeights(name="one"))
        size = sum(path.stat().st_size for path in directory(tmp_path / format_name).iterdir())
        shutil.rmtree(tmp_path / format_name)
        for limit, fits in ((size - 1, False), (int(1.2 * size), True)):
            small = train(
                full_driver(output_dir=tmp_path / format_name, ckpt_manager=format_name, storage_limit_bytes=limit), 1
            )
            (outcome,) = small.run((MODEL, SaveWeights(name="one")))
            assert isinstance(outcome, Failed) is not fits
            if isinstance(outcome, Failed):
                assert outcome.code == "storage_limit"


def test_a_checkpoint_whose_pickle_names_anything_else_is_not_opened(tmp_path: Path) -> None:
    from gradstream.engine.checkpoint.formats.dcp import open_dcp
    from gradstream.shared.errors import StorageFailure

    # A pickle of os.system("true").
    (tmp_path / ".metadata").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(StorageFailure, match=r"it names os\.system|it names posix\.system"):
        open_dcp(tmp_path)
