"""Saves of one state are the same bytes, so that a replay can tell by digests whether it saved what was saved."""

from pathlib import Path

from tests.support.engine_builders import Driver, cross_entropy, open_engine, random_data

from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.manifest import read_manifest
from gradstream.shared.wire import SaveWeights, SaveWeightsDone

MODEL = "s:train:1"
# With two entries in a file's header, which come in any order, all would be alike once in 2 ** 15.
NUM_SAVES = 16


def test_every_save_of_one_state_has_the_same_files(tmp_path: Path):
    driver = Driver(open_engine(output_dir=tmp_path))
    driver.create(MODEL)
    driver.done(MODEL, cross_entropy(random_data([9, 4])))
    driver.step(MODEL, learning_rate=1e-2)
    files = []
    for number in range(NUM_SAVES):
        saved = driver.done(MODEL, SaveWeights(name=f"save-{number}"))
        assert isinstance(saved, SaveWeightsDone)
        files.append(read_manifest(parse_uri(saved.path).directory(tmp_path), source=saved.path).files)
    assert all(one == files[0] for one in files)
    assert "optimizer.safetensors" in files[0]
