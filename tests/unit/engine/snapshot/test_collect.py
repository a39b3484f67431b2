import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.snapshots import assert_same_state, head, model_state

from gradstream.engine.snapshot.cut import cut_name
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.errors import StorageFailure

NAMES = "abc"


@pytest.fixture
def store(tmp_path):
    return SnapshotStore(tmp_path / "snapshots")


def directories(store):
    return {str(path.relative_to(store.directory)) for path in (store.directory / "models").glob("*/*")}


@given(
    history=st.lists(st.sets(st.sampled_from(NAMES)), min_size=1, max_size=6),
    kept=st.lists(st.booleans(), min_size=6, max_size=6),
)
@settings(max_examples=40, deadline=None)
def test_kept_cuts_stay_whole_and_what_no_cut_needs_goes(tmp_path_factory, history, kept):
    store = SnapshotStore(tmp_path_factory.mktemp("store"))
    truth = {}
    newest = {}
    for number, changed in enumerate(history, start=1):
        writes = set(NAMES) if number == 1 else changed
        newest |= dict.fromkeys(writes, number)
        store.write(head(number), [model_state(name, seed=number) for name in sorted(writes)], live=set(NAMES))
        truth[1, number] = dict(newest)
    keep = {cut_id for cut_id, is_kept in zip(truth, kept, strict=False) if is_kept}
    store.collect(keep)
    remaining = store.cuts()
    limit = max(keep, default=(0, 0))
    assert {cut.id for cut in remaining} == {cut_id for cut_id in truth if cut_id in keep or cut_id > limit}
    for cut in remaining:
        store.verify(cut)
        for name, number in truth[cut.id].items():
            assert_same_state(store.read(cut, name), model_state(name, seed=number))
    assert directories(store) == {entry.directory for cut in remaining for entry in cut.models.values()}


def test_collect_says_how_many_cuts_went_and_empty_model_directories_go_too(store):
    for number, name in enumerate("abb", start=1):
        store.write(head(number), [model_state(name)], live={name})
    assert store.collect({(1, 3)}) == 2
    assert store.collect({(1, 3)}) == 0
    assert [path.name for path in (store.directory / "models").iterdir()] == ["b"]


def test_leftovers_of_crashed_writers_go_once_a_newer_cut_is_kept(store):
    store.write(head(1), [model_state("a")], live={"a"})
    model = store.directory / "models" / "a"
    old, new = f".{cut_name((1, 2))}.x1.tmp", f".{cut_name((1, 9))}.x2.tmp"
    (model / cut_name((1, 2))).mkdir()
    (model / cut_name((1, 2)) / "part").write_text("x")
    for name in (old, new):
        (model / name).mkdir()
        (store.directory / "cuts" / name).write_text("half")
    store.collect({(1, 1)})
    assert (model / old).exists()
    store.write(head(3), [], live={"a"})
    store.collect({(1, 1), (1, 3)})
    assert {path.name for path in model.iterdir()} == {cut_name((1, 1)), new}
    assert {path.name for path in (store.directory / "cuts").glob(".*")} == {new}


def test_one_that_was_fenced_off_takes_nothing_from_its_successor(store):
    first = store.write(head(1), [model_state("a", seed=1)], live={"a"})
    store.write(head(2), [model_state("a", seed=2)], live={"a"})
    successor = SnapshotStore(store.directory, base=first)
    cut = successor.write(head(2, epoch=2), [model_state("b")], live={"a", "b"})
    store.collect({(1, 2)})
    successor.verify(cut)
    assert_same_state(successor.read(cut, "a"), model_state("a", seed=1))


def test_nothing_is_removed_when_a_kept_cut_cannot_be_read(store):
    for number in (1, 2, 3):
        cut = store.write(head(number), [model_state("a", seed=number)], live={"a"})
    before = directories(store)
    (store.directory / "cuts" / f"{cut.name}.json").write_text("{")
    with pytest.raises(StorageFailure, match=cut.name):
        store.collect({(1, 3)})
    with pytest.raises(StorageFailure, match=cut.name):
        store.collect({(1, 2)})
    assert directories(store) == before
    assert len(store.cuts()) == 2
