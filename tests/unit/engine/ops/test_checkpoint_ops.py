from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.engine_builders import (
    MOE,
    Driver,
    cross_entropy,
    logprobs_of,
    loss_of,
    open_engine,
    random_data,
    randomize,
)

from gradstream.engine.checkpoint.budget import DiskBudget
from gradstream.engine.engine import Engine
from gradstream.engine.state import EngineState
from gradstream.shared.ids import ModelId, SamplerId, SessionId, TenantId
from gradstream.shared.wire import (
    Failed,
    LoadWeights,
    LoadWeightsDone,
    SaveExternal,
    SaveExternalDone,
    SaveForSampler,
    SaveForSamplerDone,
    SaveWeights,
    SaveWeightsDone,
)

DATA = random_data([20, 9, 33])
URI = "tinker://s:train:0/weights/ck"


@pytest.fixture(scope="module", params=["dense", "moe"])
def engine(request, tmp_path_factory):
    options = {"path": MOE} if request.param == "moe" else {}
    return open_engine(output_dir=tmp_path_factory.mktemp("output"), **options)


@pytest.fixture
def driver(engine, tmp_path):
    """A driver with a fresh state of its own on the shared base model."""
    shared = engine.state
    config = replace(shared.config, output_dir=tmp_path)
    return Driver(Engine(EngineState(config=config, comm=shared.comm, base=shared.base)))


def trained(driver, model="s:train:0", *, steps=2, **options):
    driver.create(model, **options)
    randomize(driver, model)
    train(driver, model, steps=steps)
    return model


def train(driver, model, *, steps):
    return [
        (loss_of(driver.done(model, cross_entropy(DATA))), driver.step(model, learning_rate=1e-2, weight_decay=0.01))
        for _ in range(steps)
    ]


def failure(driver, model, payload, **options):
    (outcome,) = driver.run((model, payload), **options)
    assert isinstance(outcome, Failed), outcome
    return outcome


def load(path=URI, *, with_optimizer=True, create=False, session_id="s"):
    return LoadWeights(
        path=path, with_optimizer=with_optimizer, create=create, session_id=SessionId(session_id) if create else None
    )


def test_a_save_answers_with_the_checkpoints_uri(driver):
    model = trained(driver, steps=1)
    assert driver.done(model, SaveWeights(name="ck")) == SaveWeightsDone(path=URI)


def test_training_goes_on_from_a_checkpoint_to_the_same_bits(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    expected = train(driver, model, steps=3)
    final = driver.weights(model)
    assert driver.done(model, load()) == LoadWeightsDone(path=URI, model_id=ModelId(model))
    assert train(driver, model, steps=3) == expected
    assert torch.equal(driver.weights(model), final)


def test_a_model_made_from_a_checkpoint_continues_to_the_same_bits(driver):
    model = trained(driver, rank=5, train_mlp=False)
    driver.done(model, SaveWeights(name="ck"))
    expected = train(driver, model, steps=2)
    assert driver.done("s:train:1", load(create=True)) == LoadWeightsDone(path=URI, model_id=ModelId("s:train:1"))
    assert train(driver, "s:train:1", steps=2) == expected
    assert torch.equal(driver.weights("s:train:1"), driver.weights(model))
    spec = driver.engine.state.models[ModelId("s:train:1")].spec
    assert (spec.rank, spec.train_mlp, spec.train_attn) == (5, False, True)


def test_weights_only_gives_the_same_losses_and_a_fresh_optimizer(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    driver.done("s:train:1", load(create=True, with_optimizer=False))
    driver.create("s:train:2")
    state = driver.engine.state.models
    state[ModelId("s:train:2")].weights.copy_(state[ModelId(model)].weights)
    assert train(driver, "s:train:1", steps=2) == train(driver, "s:train:2", steps=2)


def test_a_load_drops_the_accumulated_gradient(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    driver.done(model, cross_entropy(DATA))
    driver.done(model, load())
    assert not driver.grad(model).any()


def test_a_save_between_backward_and_step_changes_nothing(driver):
    model = trained(driver)
    driver.done(model, cross_entropy(DATA))
    gradient = driver.grad(model)
    driver.done(model, SaveWeights(name="ck"))
    assert torch.equal(driver.grad(model), gradient)


def test_a_taken_name_is_an_error_and_overwrite_replaces(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    assert failure(driver, model, SaveWeights(name="ck")).code == "checkpoint_exists"
    train(driver, model, steps=1)
    driver.done(model, SaveWeights(name="ck", overwrite=True))
    wanted = driver.weights(model)
    train(driver, model, steps=1)
    driver.done(model, load())
    assert torch.equal(driver.weights(model), wanted)


def test_sampler_weights_can_be_trained_on_without_an_optimizer(driver):
    model = trained(driver)
    done = driver.done(model, SaveForSampler(name="s1"))
    assert done == SaveForSamplerDone(path="tinker://s:train:0/sampler_weights/s1")
    driver.done("s:train:1", load(done.path, create=True, with_optimizer=False))
    ours, theirs = (driver.done(name, cross_entropy(DATA, backward=False)) for name in (model, "s:train:1"))
    np.testing.assert_array_equal(np.concatenate(logprobs_of(ours)), np.concatenate(logprobs_of(theirs)))
    assert "no optimizer state" in failure(driver, "s:train:2", load(done.path, create=True)).message


def test_an_ephemeral_save_answers_with_its_sampler(driver):
    model = trained(driver, steps=1)
    done = driver.done(model, SaveForSampler(sampler_id=SamplerId("s:sample:0")))
    assert done == SaveForSamplerDone(sampler_id=SamplerId("s:sample:0"))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (SaveWeights(name="../up"), "cannot name a checkpoint"),
        (SaveWeights(name="a/b"), "cannot name a checkpoint"),
        (SaveForSampler(name="../up"), "cannot name a checkpoint"),
        (SaveForSampler(sampler_id=SamplerId("../up")), "not a sampler id"),
        (SaveForSampler(), "exactly one of name and sampler_id"),
        (SaveForSampler(name="a", sampler_id=SamplerId("b")), "exactly one of name and sampler_id"),
        (load("tinker://s:train:0/weights/none"), "there is no checkpoint"),
        (load("/etc/passwd"), "is not a checkpoint"),
        (load("tinker://../weights/x"), "is not a model id"),
    ],
)
def test_a_bad_request_fails_its_job_and_changes_nothing(driver, tmp_path, payload, message):
    model = trained(driver, steps=1)
    before = driver.weights(model)
    outcome = failure(driver, model, payload)
    assert outcome.category == "user"
    assert message in outcome.message
    assert torch.equal(driver.weights(model), before)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_rank_does_not_go_into_a_model(driver):
    driver.done(trained(driver, rank=4), SaveWeights(name="ck"))
    other = trained(driver, "s:train:1", rank=8)
    before = driver.weights(other)
    outcome = failure(driver, other, load())
    assert outcome.code == "invalid_request"
    assert "rank 4" in outcome.message
    assert "rank 8" in outcome.message
    assert torch.equal(driver.weights(other), before)


def test_a_failed_create_leaves_no_model(driver):
    assert failure(driver, "s:train:7", load("tinker://s:train:0/weights/none", create=True)).code == "unknown_model"
    driver.create("s:train:7")


def test_a_model_is_not_made_twice(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    assert "exists already" in failure(driver, model, load(create=True)).message


def test_another_tenant_sees_neither_the_model_nor_its_checkpoint(driver):
    model = trained(driver)
    driver.done(model, SaveWeights(name="ck"))
    other = TenantId("other")
    assert failure(driver, model, SaveWeights(name="ck2"), tenant=other).code == "unknown_model"
    assert failure(driver, "t:train:0", load(create=True), tenant=other).code == "unknown_model"


def test_a_disk_that_refuses_is_a_server_failure_and_training_goes_on(driver, tmp_path):
    model = trained(driver)
    (tmp_path / "checkpoints").write_text("in the way")
    outcome = failure(driver, model, SaveWeights(name="ck"))
    assert (outcome.code, outcome.category) == ("storage_failure", "server")
    train(driver, model, steps=1)


def test_an_external_save_holds_the_adapter_alone_and_tells_its_size(driver, tmp_path):
    model = trained(driver, steps=1)
    done = driver.done(model, SaveExternal(name="out"))
    folder = tmp_path / "checkpoints" / "s+train+0" / "external_weights" / "out"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    assert sizes.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert done == SaveExternalDone(path="tinker://s:train:0/external_weights/out", size_bytes=sum(sizes.values()))
    assert failure(driver, model, SaveExternal(name="out")).code == "checkpoint_exists"


@pytest.mark.parametrize(
    "payload",
    [
        SaveWeights(name="x"),
        SaveForSampler(name="x"),
        SaveForSampler(sampler_id=SamplerId("s:sample:1")),
        SaveExternal(name="x"),
    ],
    ids=["training", "sampler", "ephemeral", "external"],
)
def test_a_save_over_the_storage_limit_fails_and_training_goes_on(driver, tmp_path, payload):
    model = trained(driver, steps=1)
    driver.engine.state.disk = DiskBudget(tmp_path, limit_bytes=1000)
    outcome = failure(driver, model, payload)
    assert outcome.code == "storage_limit"
    assert "of storage_limit 1000" in outcome.message
    assert list(tmp_path.iterdir()) == []
    train(driver, model, steps=1)
