import os
import shutil
from contextlib import suppress

import pytest
from tests.support.snapshots import assert_same_state, head, model_state

from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.errors import StorageFailure


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "deep" / "snapshots")


def files_below(path):
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in path.rglob("*")
        if file.is_file()
    }


def shard_of(store, cut, model_id):
    entry = cut.models[model_id]
    (name,) = entry.files
    return store.directory / entry.directory / name


def test_models_come_back_to_the_bit(store):
    states = [model_state("s:train:0", seed=1), model_state("s:train:1", seed=2, has_grad=True, tenant="other")]
    cut = store.write(head(3), states, live={"s:train:0", "s:train:1"})
    other = SnapshotStore(store.directory)
    assert other.cuts() == [cut]
    other.verify(cut)
    for state in states:
        assert_same_state(other.read(cut, state.model_id), state)


def test_an_engine_without_models_has_cuts_too(store):
    cut = store.write(head(1), [], live=set())
    assert store.find((1, 1)) == cut
    store.verify(cut)


def test_what_did_not_change_is_referred_to_and_not_written_again(store):
    first = store.write(head(1), [model_state("a", seed=1), model_state("b", seed=2)], live={"a", "b"})
    before = files_below(store.directory)
    second = store.write(head(2), [model_state("b", seed=3)], live={"a", "b"})
    assert second.models["a"] == first.models["a"]
    assert_same_state(store.read(second, "a"), model_state("a", seed=1))
    assert_same_state(store.read(second, "b"), model_state("b", seed=3))
    new = set(files_below(store.directory)) - set(before)
    assert {name.split("/")[0] + "/" + name.split("/")[1] for name in new} == {"models/b", f"cuts/{second.name}.json"}
    assert before.items() <= files_below(store.directory).items()


def test_a_model_that_is_not_live_is_left_out(store):
    store.write(head(1), [model_state("a"), model_state("b")], live={"a", "b"})
    assert set(store.write(head(2), [], live={"a"}).models) == {"a"}


def test_a_successor_builds_on_the_cut_that_it_restored_and_not_on_the_newest(store):
    restored = store.write(head(1), [model_state("a", seed=1)], live={"a"})
    store.write(head(9), [model_state("a", seed=9)], live={"a"})
    successor = SnapshotStore(store.directory)
    successor.continue_from(restored)
    cut = successor.write(head(2, epoch=2), [model_state("b")], live={"a", "b"})
    assert_same_state(successor.read(cut, "a"), model_state("a", seed=1))


def test_a_live_model_that_is_nowhere_is_an_error(store):
    store.write(head(1), [model_state("a")], live={"a"})
    with pytest.raises(ValueError, match=r"live models \['b'\] are neither given nor in the snapshot before"):
        store.write(head(2), [], live={"a", "b"})
    with pytest.raises(ValueError, match=r"live models \['a'\]"):
        SnapshotStore(store.directory).write(head(2), [], live={"a"})
    with pytest.raises(ValueError, match=r"changed models \['b'\] are not live"):
        store.write(head(2), [model_state("b")], live={"a"})
    assert [cut.id for cut in store.cuts()] == [(1, 1)]


@pytest.mark.parametrize("number", [1, 2])
def test_a_cut_must_lie_after_the_one_it_builds_on(store, number):
    store.write(head(2), [], live=set())
    with pytest.raises(ValueError, match="is not after"):
        store.write(head(number), [], live=set())


def test_a_cut_is_never_replaced(store):
    cut = store.write(head(2), [model_state("a", seed=1)], live={"a"})
    with pytest.raises(StorageFailure, match="exists already"):
        SnapshotStore(store.directory).write(head(2), [model_state("a", seed=2)], live={"a"})
    store.verify(cut)
    assert_same_state(store.read(cut, "a"), model_state("a", seed=1))


@pytest.mark.parametrize("lost", ["models/a", "models", "."])
def test_files_of_the_base_that_are_gone_are_told_and_not_referred_to(store, lost):
    store.write(head(1), [model_state("a"), model_state("b")], live={"a", "b"})
    assert store.gone() == set()
    shutil.rmtree(store.directory / lost)
    with pytest.raises(StorageFailure, match="snapshot files of model a are gone"):
        store.write(head(2), [], live={"a", "b"})
    gone = store.gone()
    assert gone == ({"a"} if lost == "models/a" else {"a", "b"})
    cut = store.write(head(2), [model_state(name, seed=2) for name in sorted(gone)], live={"a", "b"})
    store.verify(cut)
    assert store.gone() == set()


def test_nothing_is_gone_of_a_store_without_a_base(store):
    assert store.gone() == set()


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [flip, cut_short, remove])
def test_verify_names_the_model_and_file_that_is_damaged(store, damage):
    cut = store.write(head(1), [model_state("a"), model_state("b")], live={"a", "b"})
    path = shard_of(store, cut, "b")
    damage(path)
    with pytest.raises(StorageFailure, match=f"damaged at model b: in models/b/{cut.name}, {path.name}"):
        store.verify(cut)
    store.verify(cut, ["a"])


@pytest.mark.parametrize("damage", [flip, cut_short])
def test_an_unreadable_cut_is_told_and_the_others_are_found(store, damage):
    first = store.write(head(1), [model_state("a")], live={"a"})
    second = store.write(head(2), [model_state("a")], live={"a"})
    damage(store.directory / "cuts" / f"{second.name}.json")
    survey = store.survey()
    assert survey.cuts == [first]
    assert len(survey.problems) == 1
    assert f"{second.name}.json is damaged" in survey.problems[0]


def test_a_cut_under_another_name_does_not_count(store):
    cut = store.write(head(1), [], live=set())
    path = store.directory / "cuts" / f"{cut.name}.json"
    path.rename(path.with_name("00000001-0000000009.json"))
    assert store.cuts() == []
    with pytest.raises(StorageFailure, match="it says that it is"):
        store.find((1, 9))


def test_a_store_that_is_not_there_is_empty(store):
    assert store.survey().cuts == store.survey().problems == []
    assert store.collect({(1, 1)} - {(1, 1)}) == 0
    with pytest.raises(StorageFailure, match="cannot be read"):
        store.find((1, 1))


def test_cuts_are_listed_newest_first(store):
    ids = [(1, 2), (1, 10), (2, 3), (10, 1)]
    for epoch, number in ids:
        store.write(head(number, epoch=epoch), [], live=set())
    assert [cut.id for cut in store.cuts()] == ids[::-1]


def fill(path):
    """Take all that is left of a disk."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def try_to_write(store, head, states):
    """The reason why it failed, if it did."""
    try:
        store.write(head, states, live={state.model_id for state in states})
    except StorageFailure as failure:
        return [failure.message]
    return []


def test_a_full_disk_leaves_the_earlier_cut_and_nothing_else(small_disk):
    store = SnapshotStore(small_disk / "snapshots")
    store.write(head(1), [model_state("a", seed=1), model_state("b", seed=1)], live={"a", "b"})
    before = files_below(store.directory)
    filler = small_disk / "filler"
    fill(filler)
    failures = []
    # Less and less of the disk is taken, so the write stops at another file each time.
    while not store.base.id > (1, 1):
        failures += try_to_write(store, head(2), [model_state("a", seed=2), model_state("b", seed=2)])
        if store.base.id == (1, 1):
            assert files_below(store.directory) == before
        os.truncate(filler, filler.stat().st_size - 4096)
    cut = store.base
    assert all("the disk is full" in message for message in failures)
    assert any("models/a" in message for message in failures)
    assert any("cuts/" in message for message in failures)
    store.verify(cut)
    assert_same_state(store.read(cut, "b"), model_state("b", seed=2))
