import errno
import os
import stat

import pytest

from gradstream.engine import files
from gradstream.engine.files import whole_directory
from gradstream.shared.errors import StorageFailure


def write(target, text, **options):
    with whole_directory(target, **options) as draft:
        (draft / "part").mkdir()
        (draft / "part" / "file").write_text(text)


def content(target):
    return (target / "part" / "file").read_text()


def test_the_directory_appears_with_its_content_and_nothing_else(tmp_path):
    write(tmp_path / "deep" / "target", "one")
    assert content(tmp_path / "deep" / "target") == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["target"]
    assert stat.S_IMODE((tmp_path / "deep" / "target").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "deep" / "target" / "part" / "file").stat().st_mode) == 0o644


def write_half(target):
    with whole_directory(target) as draft:
        (draft / "file").write_text("half")
        raise KeyError


def write_while_another_writes(target):
    with whole_directory(target) as draft:
        (draft / "file").write_text("second")
        write(target, "first")


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        write_half(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_leaves_the_old_directory(tmp_path):
    write(tmp_path / "target", "old")
    with pytest.raises(KeyError), whole_directory(tmp_path / "target", replace=True):
        raise KeyError
    assert content(tmp_path / "target") == "old"


def test_the_target_does_not_exist_while_it_is_written(tmp_path):
    with whole_directory(tmp_path / "target") as draft:
        (draft / "file").write_text("half")
        assert not (tmp_path / "target").exists()


def test_an_existing_target_is_refused_without_replace(tmp_path):
    write(tmp_path / "target", "old")
    with pytest.raises(FileExistsError):
        write(tmp_path / "target", "new")
    assert content(tmp_path / "target") == "old"


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(FileExistsError):
        write_while_another_writes(tmp_path / "target")
    assert content(tmp_path / "target") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange in one step", "two renames"])
def test_replace_puts_the_new_directory_in_place_of_the_old(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    write(tmp_path / "target", "old")
    write(tmp_path / "target", "new", replace=True)
    assert content(tmp_path / "target") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_refusing_file_system_is_a_storage_failure_that_says_why(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFailure, match=r"target: the disk is full"):
        write(tmp_path / "target", "text")
    assert list(tmp_path.iterdir()) == []
