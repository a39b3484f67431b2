"""What a person at the terminal sees of the children's logs."""

from pathlib import Path

import pytest

from gradstream.worker.echo import LogTail, loud_line


def test_warnings_and_errors_are_shown_with_their_facts() -> None:
    line = loud_line(b'{"event": "disk_low", "level": "warning", "free": 3, "timestamp": "t", "process": "api"}')
    assert line is not None
    assert (line.level, line.text) == ("warning", "disk_low free=3")


@pytest.mark.parametrize(
    "line", [b'{"event": "x", "level": "info"}', b"Traceback (most recent call last):", b"", b"[1]", b"\xff"]
)
def test_other_lines_stay_in_the_file(line: bytes) -> None:
    assert loud_line(line) is None


def test_a_long_event_is_cut() -> None:
    line = loud_line(b'{"level": "error", "event": "' + b"x" * 10_000 + b'"}')
    assert line is not None
    assert len(line.text) == 400


def test_only_what_comes_later_is_read_and_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b'{"event": "old", "level": "error"}\n')
    tail = LogTail(path)
    with path.open("ab") as log:
        log.write(b'{"event": "new", "level": "error"}\n{"event": "half", ')
    assert [line.text for line in tail.read()] == ["new"]
    assert list(tail.read()) == []
    with path.open("ab") as log:
        log.write(b'"level": "error"}\n')
    assert [line.text for line in tail.read()] == ["half"]


def test_a_file_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    tail = LogTail(tmp_path / "later.log")
    assert list(tail.read()) == []
    (tmp_path / "later.log").write_bytes(b'{"event": "first", "level": "warning"}\n')
    assert [line.text for line in tail.read()] == ["first"]
