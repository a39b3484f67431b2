"""The stock SDK of three lines (protobuf; both; JSON only) does the same things with the same numbers."""

import math

import pytest
from tests.contract.clients.running import NEWEST, OLDER, Client, needed
from tests.contract.clients.workplace import MODEL

pytestmark = [pytest.mark.e2e, pytest.mark.clients, pytest.mark.slow]


def calls(name, server, folder):
    needed(name)
    return Client(name=name, folder=folder, url=server).json("calls.py", server, MODEL)


@pytest.fixture(scope="session")
def newest(server, workplace):
    """What the newest SDK saw."""
    return calls(NEWEST, server, workplace)


@pytest.fixture(scope="session", params=OLDER)
def older(request, server, workplace):
    """What an older SDK saw."""
    return calls(request.param, server, workplace)


def leaves(node, path=()):
    """Every value of nested dicts and lists, by its path."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {where: value for key, item in items for where, value in leaves(item, (*path, key)).items()}
    return {path: node}


def assert_same(seen, expected):
    """Equal values at the same places; a sample's log-probabilities move in their last digits with what else is in its slice."""
    seen, expected = leaves(seen), leaves(expected)
    assert seen.keys() == expected.keys()
    for where, value in expected.items():
        assert seen[where] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), where


def test_the_loss_falls_step_by_step(newest):
    losses = [step["loss"] for step in newest["steps"]]

    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


def test_training_state_comes_back_bit_for_bit(newest):
    assert newest["loss_resumed"] == newest["loss_at_save"]
    assert newest["loss_restarted"] == newest["loss_at_save"]
    assert newest["loss_reloaded"] == newest["loss_at_save"]
    assert newest["step_resumed"] == newest["step_after_save"]
    assert newest["step_restarted"]["loss"] == newest["step_after_save"]["loss"]


def test_a_named_checkpoint_and_a_snapshot_of_the_same_weights_say_the_same(newest):
    assert_same(newest["said_by_checkpoint"], newest["said_by_snapshot"])
    assert leaves(newest["said_by_checkpoint"]) != leaves(newest["said_by_base"])


def test_sampled_sequences_are_whole(newest):
    for said in (newest["said_by_checkpoint"], newest["said_by_base"]):
        for sequence in said["sequences"]:
            assert 1 <= len(sequence["tokens"]) <= 8
            assert len(sequence["logprobs"]) == len(sequence["tokens"])
            assert all(value <= 0 for value in sequence["logprobs"])
        assert said["prompt_logprobs"][0] is None
        assert all(math.isfinite(value) for value in said["prompt_logprobs"][1:])


def test_the_model_is_offered_under_the_name_that_was_asked_for(newest):
    assert newest["offers_model"]
    assert newest["info"] == MODEL


def test_an_older_sdk_sees_what_the_newest_sees(older, newest):
    assert older["version"] != newest["version"]
    assert_same({**older, "version": None}, {**newest, "version": None})
