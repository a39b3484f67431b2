"""Words of a model's record, which the job log's scripts share."""

from importlib.resources import files

import pytest

from gradstream.shared.model_record import Dialect, ModelState, dialect_of, is_over


@pytest.mark.parametrize("state", ModelState)
def test_the_scripts_know_every_state_by_the_same_word(state):
    scripts = files("gradstream.shared.joblog") / "scripts"
    assert any(f"'{state}'" in script.read_text() for script in scripts.iterdir() if script.name.endswith(".lua"))


def test_a_record_that_names_no_dialect_is_of_a_tinker_model():
    assert dialect_of({}) is dialect_of({"dialect": ""}) is Dialect.TINKER
    assert dialect_of({"dialect": "xorl"}) is Dialect.XORL


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"state": "ready", "tail": "gone"}, True),
        ({"state": "unloaded", "tail": "live"}, False),
        ({"state": "unloaded"}, True),
        ({"state": "ready"}, False),
    ],
    ids=["its unload waits", "it is made anew behind its unload", "unloaded", "in memory"],
)
def test_a_model_is_over_when_the_last_that_it_accepted_is_its_unload(record, expected):
    assert is_over(record) is expected
