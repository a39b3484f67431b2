"""A save that takes a name while an older one of that name is removed keeps it."""

import shutil

import pytest
from tests.support.saved import write_save

from gradstream.engine import files
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.files import whole_directory
from gradstream.worker.storage import Storage, put_back, set_aside

URI = "tinker://m/weights/a"
OLD_MS, NEW_MS = 1000, 2000


@pytest.fixture
def directory(tmp_path):
    return parse_uri(URI).directory(tmp_path)


def overwrite(directory, root):
    """What an overwriting save does once its draft is whole."""
    draft = root / "draft"
    write_save(draft, URI, created_ms=NEW_MS)
    with whole_directory(directory, replace=True) as target:
        shutil.copytree(parse_uri(URI).directory(draft), target, dirs_exist_ok=True)


def names(directory):
    return [path.name for path in directory.parent.iterdir()]


def test_only_the_save_of_that_time_is_removed(tmp_path, directory):
    storage = Storage(tmp_path)
    write_save(tmp_path, URI, created_ms=NEW_MS)
    assert not storage.remove_save(parse_uri(URI), created_ms=OLD_MS)
    assert storage.manifest(URI).created_ms == NEW_MS
    assert storage.remove_save(parse_uri(URI), created_ms=NEW_MS)
    assert names(directory) == []
    assert not storage.remove_save(parse_uri(URI), created_ms=NEW_MS)


def test_a_save_that_cannot_be_read_is_removed(tmp_path, directory):
    write_save(tmp_path, URI, created_ms=OLD_MS)
    (directory / "manifest.json").write_text("{")
    assert Storage(tmp_path).remove_save(parse_uri(URI), created_ms=OLD_MS)
    assert names(directory) == []


def test_a_newer_save_that_was_set_aside_gets_its_name_back_whole(tmp_path, directory):
    write_save(tmp_path, URI, created_ms=NEW_MS)
    doomed = set_aside(directory)
    assert not directory.exists()
    put_back(doomed, directory)
    assert Storage(tmp_path).manifest(URI).created_ms == NEW_MS
    assert names(directory) == ["a"]


def test_a_save_that_comes_while_the_old_one_is_set_aside_keeps_the_name(tmp_path, directory):
    write_save(tmp_path, URI, created_ms=OLD_MS)
    doomed = set_aside(directory)
    overwrite(directory, tmp_path)
    put_back(doomed, directory)
    assert Storage(tmp_path).manifest(URI).created_ms == NEW_MS
    assert names(directory) == ["a"]


def test_a_save_whose_predecessor_goes_between_its_look_and_its_exchange_is_there(tmp_path, directory, monkeypatch):
    write_save(tmp_path, URI, created_ms=OLD_MS)
    swap = files._swap

    def late(draft, target):
        assert Storage(tmp_path).remove(parse_uri(URI))
        return swap(draft, target)

    monkeypatch.setattr(files, "_swap", late)
    overwrite(directory, tmp_path)
    assert Storage(tmp_path).manifest(URI).created_ms == NEW_MS
    assert names(directory) == ["a"]
