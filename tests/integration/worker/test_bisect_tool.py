"""`gradstream bisect` on the golden run and on copies of it in which something went wrong."""

import msgspec
import numpy as np
import pytest
from tests.support.golden import (
    FIRST,
    GOLDEN,
    SECOND,
    SOURCE,
    batch_of,
    bisect,
    changed,
    found,
    replayed,
    source,
    with_outcome,
)

from gradstream.shared.columns import Column
from gradstream.shared.wire import Failed, ForwardBackwardDone, Outcome

RECORD = ["--log", str(GOLDEN)]
TOLERANT = ["--tolerant", "1e-3"]


def nan_loss(outcome: Outcome) -> Outcome:
    assert isinstance(outcome, ForwardBackwardDone)
    return msgspec.structs.replace(outcome, metrics={"loss:sum": float("nan")})


def nan_output(outcome: Outcome) -> Outcome:
    assert isinstance(outcome, ForwardBackwardDone)
    arrays = [array.copy() for array in outcome.outputs["logprobs"].arrays()]
    arrays[0][1] = np.inf
    outputs = {**outcome.outputs, "logprobs": Column.of(arrays, dtype="float32")}
    return msgspec.structs.replace(outcome, outputs=outputs)


def test_a_loss_above_a_limit_is_found_without_a_model_and_shown_with_its_surroundings():
    hit = found(*RECORD, "--loss-above", "150")
    assert (hit.future_id, hit.batch, hit.replayed_from) == (f"{FIRST}:1", "1-3", None)
    assert hit.what.startswith("the loss is 178.6")
    assert (hit.before.batch, hit.after.batch) == ("1-1", "1-4")
    assert hit.job["payload"]["loss_fn"] == "cross_entropy"
    text = bisect(*RECORD, "--loss-above", "150").output
    assert f"{FIRST}:1 in batch 1-3" in text
    assert "the model's batch after" in text


def test_what_never_happens_is_not_found_with_status_one():
    assert found(*RECORD, "--loss-above", "1e6", status=1).found is False
    assert "not found" in bisect(*RECORD, "--loss-above", "1e6").output


def test_only_the_named_model_is_looked_at_and_only_up_to_the_named_job():
    assert found(*RECORD, "--loss-above", "100", "--model", SECOND).batch == str(batch_of(f"{SECOND}:3"))
    assert not found(*RECORD, "--loss-above", "100", "--model", SECOND, "--to", f"{SECOND}:2", status=1).found


@pytest.mark.parametrize(
    ("expression", "future"),
    [
        pytest.param("op == 'optim_step' and step == 2", f"{SECOND}:5", id="metrics"),
        pytest.param("failed and error == 'invalid_request'", f"{SECOND}:4", id="failure"),
        pytest.param(
            "any(a.size > 8 and a.min() < m for m in [0] for a in outputs['logprobs'])", f"{FIRST}:1", id="outputs"
        ),
        pytest.param("payload.path.endswith('/middle')", f"{FIRST}:6", id="payload"),
    ],
)
def test_an_expression_on_what_was_recorded_needs_no_replay(expression, future):
    narrowed = f"op == 'load_weights' and {expression}" if "payload" in expression else expression
    hit = found(*RECORD, "--expr", narrowed)
    assert (hit.future_id, hit.replayed_from) == (future, None)


def test_an_expression_on_weights_is_answered_by_a_replay():
    hit = found(*SOURCE, *TOLERANT, "--expr", "op == 'optim_step' and exp_avg_sq.max() > 0")
    assert (hit.future_id, hit.replayed_from) == (f"{FIRST}:2", "start")


def test_a_name_of_state_is_passed_over_where_there_is_none():
    """Only between a pass and its step is something accumulated."""
    hit = found(*SOURCE, *TOLERANT, "--model", SECOND, "--expr", "grad.abs().max() > 0")
    assert hit.future_id == f"{SECOND}:1"


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        pytest.param("los > 3", "'los' is not known", id="unknown name"),
        pytest.param("loss >", "is not a Python expression", id="syntax"),
        pytest.param("loss.nothing", "raised AttributeError at", id="raises"),
    ],
)
def test_an_expression_that_cannot_be_answered_says_why_with_status_two(expression, words):
    refused = bisect(*RECORD, "--expr", expression)
    assert refused.exit_code == 2
    assert words in refused.output


@pytest.mark.parametrize("edit", [nan_loss, nan_output], ids=["loss", "output"])
def test_a_recorded_number_that_is_not_finite_is_found_with_and_without_a_replay(tmp_path, edit):
    file = changed(tmp_path / "nan.gslog", with_outcome(f"{SECOND}:6", edit))
    assert found("--log", file, "--non-finite", "--recorded-only").future_id == f"{SECOND}:6"
    hit = found(*source(file), *TOLERANT, "--non-finite")
    assert (hit.future_id, hit.replayed_from) == (f"{SECOND}:6", "start")


def test_a_job_that_was_refused_for_a_non_finite_number_is_found(tmp_path):
    def edit(outcome: Outcome) -> Outcome:
        del outcome
        return Failed(code="non_finite", category="user", message="the loss of datum 0 is nan")

    file = changed(tmp_path / "nan.gslog", with_outcome(f"{FIRST}:4", edit))
    hit = found("--log", file, "--non-finite")
    assert (hit.future_id, hit.what) == (f"{FIRST}:4", "the loss of datum 0 is nan")
    assert any("models before this job were not looked at" in remark for remark in hit.remarks)


def test_a_run_without_a_bad_number_has_none():
    assert not found(*SOURCE, *TOLERANT, "--non-finite", status=1).found


def test_the_first_job_that_comes_out_otherwise_is_found(tmp_path):
    file = changed(tmp_path / "wrong.gslog", with_outcome(f"{SECOND}:6", nan_loss))
    hit = found(*source(file), *TOLERANT, "--digest-differs")
    assert (hit.future_id, hit.batch) == (f"{SECOND}:6", str(batch_of(f"{SECOND}:6")))
    assert hit.future_id == replayed(*source(file), *TOLERANT, status=1).first_difference.future_id
    assert not found(*SOURCE, *TOLERANT, "--digest-differs", status=1).found


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--non-finite", "--digest-differs"],
        ["--expr", "loss > 1", "--goes-on"],
        ["--loss-above", "1", "--to", "9-9"],
    ],
    ids=["nothing", "two conditions", "goes-on of a record", "unknown batch"],
)
def test_a_search_that_is_not_one_ends_with_status_two(arguments):
    assert bisect(*RECORD, *arguments).exit_code == 2
