"""Ids: what they may look like, and that they cannot leave their place in a key or a path."""

import pytest

from gradstream.shared.ids import (
    FutureId,
    ModelId,
    SessionId,
    future_id,
    future_parts,
    is_valid_future_id,
    is_valid_id,
    is_valid_name,
    model_id,
    sampler_id,
)
from gradstream.shared.joblog.keys import Keys
from gradstream.shared.joblog.port import RecordKind


def test_ids_follow_from_their_session_and_number() -> None:
    session = SessionId("abc")
    assert (model_id(session, 2), sampler_id(session, 3)) == ("abc:train:2", "abc:sample:3")
    assert future_id(model_id(session, 2), 7) == "abc:train:2:7"


@pytest.mark.parametrize(
    "text", ["", "a b", "a\nb", "../x", "a..b", "/a", "-a", "a/b", "a{b}", "a" * 201, "a*", "\u00e4"]
)
def test_text_that_could_leave_its_place_is_no_id(text: str) -> None:
    assert not is_valid_id(text)
    assert not is_valid_name(text)


def test_a_name_has_no_colon_and_an_id_may() -> None:
    assert is_valid_id("a:b")
    assert not is_valid_name("a:b")
    assert is_valid_name("step-0001.final")


def test_all_keys_of_an_engine_share_one_hash_tag() -> None:
    keys = Keys("gpu0")
    names = [keys.log, keys.journal, keys.notes, keys.cursor, keys.lease, keys.epoch, keys.card, keys.stat]
    names += [keys.future(future_id(ModelId("m"), 1)), keys.record(RecordKind.MODEL, "m")]
    assert all(name.startswith("gs:{gpu0}:") for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("engine", ["", "a}b", "a:b", "a b"])
def test_an_engine_name_that_would_break_the_keys_is_refused(engine: str) -> None:
    with pytest.raises(ValueError, match="engine name"):
        Keys(engine)


def test_the_future_of_the_longest_owner_is_one() -> None:
    owner = ModelId("t" * 64 + ":" + "m" * 128)
    assert is_valid_id(owner)
    assert is_valid_future_id(future_id(owner, 2**63 - 1))
    assert not is_valid_future_id(f"{owner}:")
    assert not is_valid_future_id(f"{owner}:1x")
    assert not is_valid_future_id("a/b:1")
    assert not is_valid_future_id("1")


def test_a_future_falls_into_what_it_was_made_of() -> None:
    for owner in (
        ModelId("mine"),
        ModelId("acme:mine"),
        model_id(SessionId("abc"), 2),
        sampler_id(SessionId("abc"), 3),
    ):
        parts = future_parts(future_id(owner, 7))
        assert (parts.owner, parts.seq) == (owner, 7)
    with pytest.raises(ValueError, match="invalid literal"):
        future_parts(FutureId("acme:mine"))
