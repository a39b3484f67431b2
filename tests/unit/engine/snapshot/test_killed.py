"""A writer that is killed at every touch of the file system in turn leaves valid cuts."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[4]

PRELUDE = """
import shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from gradstream.engine.snapshot.store import SnapshotStore
from tests.support.killed import survive_from
from tests.support.snapshots import assert_same_state, head, model_state

template, place = Path(sys.argv[1]), Path(sys.argv[2])

def states(number, names):
    return [model_state(name, seed=number) for name in names]

def check(directory, cut, seeds):
    store = SnapshotStore(directory)
    store.verify(cut)
    for name, seed in seeds.items():
        assert_same_state(store.read(cut, name), model_state(name, seed=seed))

def run(work, after):
    instant = 0
    while True:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place)
        ended = survive_from(instant, work)
        after(ended)
        if ended:
            return instant
        instant += 1
"""

WRITE = """
first = SnapshotStore(template).write(head(1), states(1, "abc"), live=set("abc"))

def work():
    SnapshotStore(place, base=first).write(head(2), states(2, "bcd"), live=set("abcd"))

seen = set()
def after(ended):
    store = SnapshotStore(place)
    found = store.survey()
    assert found.problems == []
    ids = [cut.id for cut in found.cuts]
    assert ids in ([(1, 1)], [(1, 2), (1, 1)]) and (not ended or len(ids) == 2), ids
    seen.add(len(ids))
    check(place, found.cuts[-1], dict(a=1, b=1, c=1))
    if len(ids) == 2:
        check(place, found.cuts[0], dict(a=1, b=2, c=2, d=2))
    # A successor goes on, and sweeps what was left.
    store.continue_from(found.cuts[0])
    cut = store.write(head(1, epoch=2), states(3, "abcd"), live=set("abcd"))
    store.collect({cut.id})
    check(place, cut, dict.fromkeys("abcd", 3))
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) == 5, files

assert run(work, after) > 30
assert seen == {1, 2}
"""

COLLECT = """
store = SnapshotStore(template)
for number, names in enumerate(["abc", "a", "b", ""], start=1):
    store.write(head(number), states(number, names), live=set("abc"))

def work():
    SnapshotStore(place).collect({(1, 2), (1, 4)})

def after(ended):
    store = SnapshotStore(place)
    found = store.survey()
    assert found.problems == []
    cuts = {cut.id: cut for cut in found.cuts}
    check(place, cuts[1, 2], dict(a=2, b=1, c=1))
    check(place, cuts[1, 4], dict(a=2, b=3, c=1))
    # What is listed is whole, or will go: never a cut whose files went first.
    for cut in found.cuts:
        store.verify(cut)
    store.collect({(1, 2), (1, 4)})
    assert len([path for path in place.rglob("*") if path.is_file()]) == 6

assert run(work, after) > 10
"""


# Some hundred forks, each with its own copy of the store.
@pytest.mark.parametrize("scenario", [WRITE, COLLECT], ids=["write", "collect"])
def test_a_kill_at_any_instant_leaves_what_was_there(tmp_path, scenario):
    template, place = tmp_path / "template", tmp_path / "place"
    command = [sys.executable, "-c", PRELUDE + scenario, template, place]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(place)
