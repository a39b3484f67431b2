import msgspec
import pytest
from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data, randomize
from tests.support.snapshots import assert_same_state, head, model_state, restore, snapshot

from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.wire import Failed, RestoreSnapshot, RestoreSnapshotDone


@pytest.fixture
def trained(llama):
    """Two models with a step taken and a gradient accumulated, on a random Llama."""
    driver = Driver(open_engine(llama))
    for name, rank in (("a", 4), ("b", 8)):
        driver.create(name, rank=rank)
        randomize(driver, name)
        driver.done(name, cross_entropy(random_data([9], seed=rank)))
        driver.step(name, learning_rate=0.1)
        driver.done(name, cross_entropy(random_data([9], seed=rank + 1)))
    return driver


def held(engine):
    return {model.model_id: model for model in engine.capture(engine.state.models)}


def test_models_that_are_held_are_replaced_and_others_stay(trained, tmp_path):
    payload = msgspec.structs.replace(snapshot(trained.engine, tmp_path), drop_others=False, model_ids=["a"])
    then = held(trained.engine)
    trained.step("a", learning_rate=0.1)
    trained.step("b", learning_rate=0.1)
    trained.create("c")
    now = held(trained.engine)
    outcome = restore(trained.engine, payload)
    assert [(model.model_id, model.step) for model in outcome.models] == [("a", 1)]
    found = held(trained.engine)
    assert list(found) == ["a", "b", "c"]
    for name, expected in (("a", then["a"]), ("b", now["b"]), ("c", now["c"])):
        assert_same_state(found[name], expected)


def test_drop_others_leaves_nothing_but_what_was_restored(trained, tmp_path):
    payload = snapshot(trained.engine, tmp_path)
    trained.create("c")
    restore(trained.engine, msgspec.structs.replace(payload, model_ids=["b"]))
    assert list(held(trained.engine)) == ["b"]


def test_models_keep_their_tenants_and_owners(tmp_path):
    driver = Driver(open_engine())
    driver.create("a", seed=None)
    payload = snapshot(driver.engine, tmp_path)
    owner = driver.engine.state.models["a"].owner
    other = open_engine(seed=5)
    restore(other, payload)
    assert other.state.models["a"].owner == owner
    assert owner.spec.seed is not None


@pytest.mark.parametrize("damage", ["flip", "missing", "no cut", "unknown model"])
def test_a_damaged_snapshot_changes_nothing_in_memory(trained, tmp_path, damage):
    payload = snapshot(trained.engine, tmp_path)
    trained.step("a", learning_rate=0.1)
    before = held(trained.engine)
    (shard,) = (tmp_path / "models" / "b").rglob("*.safetensors")
    match damage:
        case "flip":
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
            reason = f"{shard.name} does not have the digest"
        case "missing":
            shard.unlink()
            reason = f"{shard.name} cannot be read"
        case "no cut":
            payload = msgspec.structs.replace(payload, number=7)
            reason = "00000001-0000000007.json cannot be read"
        case _:
            payload = msgspec.structs.replace(payload, model_ids=["a", "x"])
            reason = "holds no model x"
    outcome = restore(trained.engine, payload)
    assert isinstance(outcome, Failed)
    assert outcome.code == "storage_failure"
    assert reason in outcome.message
    after = held(trained.engine)
    assert after.keys() == before.keys()
    for name, state in before.items():
        assert_same_state(after[name], state)


def test_models_that_do_not_fit_are_told_and_the_others_are_restored(trained, tmp_path):
    good = trained.engine.capture(["a"])
    foreign = model_state("foreign")
    store = SnapshotStore(tmp_path)
    store.write(head(1), [*good, foreign], live={"a", "foreign"})
    outcome = restore(trained.engine, RestoreSnapshot(directory=str(tmp_path), epoch=1, number=1, drop_others=True))
    assert isinstance(outcome, RestoreSnapshotDone)
    assert [model.model_id for model in outcome.models] == ["a"]
    assert list(outcome.failed) == ["foreign"]
    assert "model foreign does not fit this base model" in outcome.failed["foreign"]
    assert list(held(trained.engine)) == ["a"]


def test_a_model_of_another_base_does_not_fit(trained, tmp_path):
    payload = snapshot(trained.engine, tmp_path)
    other = open_engine()
    outcome = restore(other, payload)
    assert set(outcome.failed) == {"a", "b"}
    assert not other.state.models
