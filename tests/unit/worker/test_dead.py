"""Dead letters on disk: what is kept, for how long, and for whom."""

import os
import stat
from pathlib import Path

import pytest
from tests.support.worker_jobs import job

from gradstream.shared import codec
from gradstream.shared.errors import StorageFailure
from gradstream.shared.ids import FutureId
from gradstream.shared.wire import Failed, Job
from gradstream.worker.dead import DeadLetters

ERROR = Failed(code="server_error", category="server", message="this optim_step was set aside")


def put(letters: DeadLetters, one: Job, *, at_ms: int = 1000) -> bool:
    return letters.put(one, ERROR, starts=2, at_ms=at_ms)


def files(letters: DeadLetters) -> list[Path]:
    return sorted(letters.directory.glob("*.letter"))


def test_a_letter_comes_back_with_its_error_and_its_body(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    body = os.urandom(50_000)
    put(letters, job("s1:train:1", 3, "forward_backward", num_tokens=12, payload=body), at_ms=77)
    (letter,) = letters.survey().letters
    assert (letter.future_id, letter.op, letter.seq, letter.num_tokens) == ("s1:train:1:3", "forward_backward", 3, 12)
    assert (letter.starts, letter.at_ms, letter.error, letter.retried_as) == (2, 77, ERROR, None)
    assert letters.payload(letter) == body
    assert letters.letter(FutureId("s1:train:1:3")) == letter
    assert letters.letter(FutureId("s1:train:1:4")) is None


def test_only_the_owner_of_the_server_can_read_a_letter(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    put(letters, job("s1:train:1", 3, "optim_step"))
    (path,) = files(letters)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(letters.directory.stat().st_mode) == 0o700


def test_the_first_line_of_a_file_is_json_for_people_without_this_tool(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    put(letters, job("s1:train:1", 3, "optim_step"))
    (path,) = files(letters)
    assert path.name == "s1%3Atrain%3A1%3A3.letter"
    assert b'"future_id":"s1:train:1:3"' in path.read_bytes().splitlines()[0]


def test_a_job_that_is_set_aside_twice_leaves_one_letter_with_what_was_noted_in_it(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    one = job("s1:train:1", 3, "optim_step")
    put(letters, one)
    noted = letters.note_retry(letters.survey().letters[0], future_id=FutureId("s1:train:1:9"), at_ms=5)
    assert put(letters, one)
    assert letters.survey().letters == [noted]
    assert letters.payload(noted) == one.payload


def test_ids_of_any_length_and_look_stay_inside_the_directory(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    owners = ["a" * 190, ":" * 190, "../../etc/passwd", "a" * 189 + "b"]
    for owner in owners:
        assert put(letters, job(owner, 1, "optim_step"))
    assert {letter.owner for letter in letters.survey().letters} == set(owners)
    assert len(files(letters)) == 4


def test_the_oldest_letters_go_when_there_are_too_many(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, max_letters=3)
    for seq in range(1, 6):
        put(letters, job("s1:train:1", seq, "optim_step"), at_ms=seq)
        os.utime(letters._path(FutureId(f"s1:train:1:{seq}")), ns=(seq, seq))
    assert [letter.seq for letter in letters.survey().letters] == [3, 4, 5]


def test_the_oldest_letters_go_when_they_are_too_large_and_the_newest_stays_whatever_its_size(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path, max_bytes=5000)
    for seq in (1, 2, 3):
        put(letters, job("s1:train:1", seq, "optim_step", payload=os.urandom(2000)))
        os.utime(letters._path(FutureId(f"s1:train:1:{seq}")), ns=(seq, seq))
    assert [letter.seq for letter in letters.survey().letters] == [2, 3]
    put(letters, job("s1:train:1", 4, "optim_step", payload=os.urandom(9000)))
    assert [letter.seq for letter in letters.survey().letters] == [4]


def test_a_disk_that_refuses_does_not_stop_the_gang(tmp_path: Path) -> None:
    (tmp_path / "dead").write_text("a file where the directory should be")
    assert put(DeadLetters(tmp_path), job("s1:train:1", 1, "optim_step")) is False


def test_damage_is_named_and_hides_no_other_letter(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    for seq in (1, 2, 3):
        put(letters, job("s1:train:1", seq, "optim_step", payload=b"body" * 100))
    first, second, _ = files(letters)
    first.write_bytes(b"{ not json\n")
    second.write_bytes(second.read_bytes()[:-3])
    survey = letters.survey()
    assert [letter.seq for letter in survey.letters] == [2, 3]
    assert len(survey.problems) == 1
    with pytest.raises(StorageFailure, match="cannot be read"):
        letters.payload(survey.letters[0])
    assert letters.drop(FutureId("s1:train:1:1"))
    assert letters.survey().problems == []


def test_a_body_that_was_exchanged_is_noticed(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    put(letters, job("s1:train:1", 1, "optim_step", payload=b"body" * 100))
    (path,) = files(letters)
    head = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(head + codec.compress(b"evil" * 100))
    with pytest.raises(StorageFailure, match="damaged"):
        letters.payload(letters.survey().letters[0])


def test_a_job_whose_body_was_gone_leaves_a_letter_that_says_so(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    put(letters, job("s1:train:1", 1, "optim_step", payload=b""))
    (letter,) = letters.survey().letters
    with pytest.raises(StorageFailure, match="was gone"):
        letters.payload(letter)


def test_dropping_removes_one_letter(tmp_path: Path) -> None:
    letters = DeadLetters(tmp_path)
    put(letters, job("s1:train:1", 1, "optim_step"))
    put(letters, job("s1:train:1", 2, "optim_step"))
    assert letters.drop(FutureId("s1:train:1:1")) is True
    assert letters.drop(FutureId("s1:train:1:1")) is False
    assert [letter.seq for letter in letters.survey().letters] == [2]


def test_there_are_no_letters_where_none_was_put(tmp_path: Path) -> None:
    survey = DeadLetters(tmp_path / "none").survey()
    assert (survey.letters, survey.problems) == ([], [])
