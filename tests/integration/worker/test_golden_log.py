"""The recorded run in tests/golden is replayed to the same digests, or refused with what is different here."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.support.golden import (
    FIRST,
    GOLDEN,
    MODEL,
    SECOND,
    SOURCE,
    batch_of,
    changed,
    golden_fingerprint,
    replay,
    replayed,
    source,
    with_batch,
    with_fingerprint,
    with_outcome,
)

from gradstream.shared.wire import Failed, OptimStepDone, Outcome
from gradstream.worker.replaying.fingerprints import differences
from gradstream.worker.replaying.report import ReplayReport

TOLERANT = ["--tolerant", "1e-3"]


def here() -> str:
    """The fingerprint of this machine's engine when it is set up as the golden run's was."""
    return replayed(*SOURCE, *TOLERANT).fingerprint


def is_same_machine() -> bool:
    return not differences(golden_fingerprint(), here())


def test_the_golden_run_is_small_and_holds_what_its_page_says():
    done = replayed(*SOURCE, *TOLERANT)
    assert GOLDEN.stat().st_size < 32 * 1024
    assert {job.op for job in done.jobs} == {
        "create_model",
        "forward_backward",
        "optim_step",
        "save_weights",
        "load_weights",
    }
    assert {job.model for job in done.jobs} == {FIRST, SECOND}
    assert any(
        len({job.model for job in done.jobs if job.batch == batch}) == 2 for batch in {j.batch for j in done.jobs}
    )


def test_the_golden_run_gives_the_same_digests_or_is_refused_with_what_differs():
    found = differences(golden_fingerprint(), here())
    if not found:
        done = replayed(*SOURCE)
        assert (done.num_equal, done.num_differing, done.num_not_run) == (17, 0, 0)
        assert all(job.digest == job.replayed_digest for job in done.jobs)
    else:
        refused = replay(*SOURCE)
        assert refused.exit_code == 2, refused.output
        assert all(sentence in refused.output for sentence in found)


def test_the_golden_run_comes_out_within_a_thousandth_on_every_machine():
    done = replayed(*SOURCE, *TOLERANT)
    assert (done.num_equal, done.num_differing, done.num_not_run) == (17, 0, 0)
    assert all(
        job.replayed_loss == pytest.approx(job.loss, rel=1e-3) for job in done.jobs if job.replayed_loss is not None
    )


def test_another_kind_of_processor_is_refused_by_name_and_comes_close_within_a_tolerance():
    """torch is told to do without wide instructions, so the bits are really other ones."""
    command = [Path(sys.executable).with_name("gradstream"), "replay", *SOURCE]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr
    assert "device is cpu-DEFAULT" in refused.stderr
    assert "--tolerant" in refused.stderr
    close = subprocess.run(
        [*command, *TOLERANT, "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert close.returncode == 0, close.stderr
    done = msgspec.json.decode(close.stdout, type=ReplayReport)
    assert done.num_equal == 17
    assert any("device is cpu-DEFAULT" in remark for remark in done.remarks)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        pytest.param({"torch": "1.0"}, "torch is ", id="torch"),
        pytest.param({"model": "00"}, "and was 00", id="model"),
        pytest.param({"ranks": "2"}, "written by 2 ranks", id="ranks"),
    ],
)
def test_a_log_of_another_engine_is_refused_and_replayed_within_a_tolerance(tmp_path, facts, words):
    file = changed(tmp_path / "other.gslog", with_fingerprint(**facts))
    refused = replay(*source(file))
    assert refused.exit_code == 2
    assert words in refused.output
    assert replayed(*source(file), *TOLERANT).num_differing == 0


def test_a_job_that_was_recorded_otherwise_is_named_and_the_status_is_one(tmp_path):
    def edit(outcome: Outcome) -> Outcome:
        assert isinstance(outcome, OptimStepDone)
        return OptimStepDone(metrics={**outcome.metrics, "grad_norm": 2 * outcome.metrics["grad_norm"]})

    file = changed(tmp_path / "wrong.gslog", with_outcome(f"{FIRST}:5", edit))
    done = replayed(*source(file), *TOLERANT, status=1)
    assert [(job.future_id, job.verdict) for job in done.jobs if job.verdict != "equal"] == [(f"{FIRST}:5", "differs")]
    assert "grad_norm is" in done.first_difference.what
    table = replay(*source(file), *TOLERANT)
    assert table.exit_code == 1
    assert f"first difference: batch {batch_of(f'{FIRST}:5')}, optim_step {FIRST}:5" in table.output


def test_a_job_that_had_failed_must_fail_the_same_way_again(tmp_path):
    def edit(outcome: Outcome) -> Outcome:
        assert isinstance(outcome, Failed)
        return msgspec.structs.replace(outcome, code="non_finite")

    file = changed(tmp_path / "wrong.gslog", with_outcome(f"{SECOND}:4", edit))
    done = replayed(*source(file), *TOLERANT, status=1)
    assert done.first_difference.what == "it failed with invalid_request and had failed with non_finite"


def test_a_save_that_comes_out_otherwise_is_noticed_where_it_is_loaded(tmp_path):
    if not is_same_machine():
        pytest.skip("only equal bits make equal files")
    file = changed(
        tmp_path / "wrong.gslog",
        with_batch(batch_of(f"{FIRST}:6"), lambda one: msgspec.structs.replace(one, sources={f"{FIRST}:6": "0" * 32})),
    )
    done = replayed(*source(file), status=1)
    assert done.first_difference.future_id == f"{FIRST}:6"
    assert "is not the one that was loaded" in done.first_difference.what


def test_one_model_is_replayed_with_those_that_shared_its_batches_and_up_to_a_job():
    done = replayed(*SOURCE, *TOLERANT, "--model", FIRST, "--to", f"{FIRST}:2")
    assert done.models == [FIRST, SECOND]
    assert [job.batch for job in done.jobs] == ["1-1", "1-2", "1-3", "1-3", "1-4", "1-4"]
    assert done.end == "1-4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--to", "golden:train:1:99"], "is not in this log", id="unknown job"),
        pytest.param(["--to", "7-1"], "is not in this log", id="unknown batch"),
        pytest.param(["--model", "nobody:train:1"], "nothing of nobody:train:1 trains in this log", id="unknown model"),
        pytest.param(["--from", "snapshot"], "has no snapshots", id="no snapshots"),
        pytest.param(["--to", "1-3", "--break-at", "1-7"], "comes after 1-3", id="break too late"),
        pytest.param(["--dump-at", "1-3"], "give both", id="dump-at without dump"),
        pytest.param(["--device", "tpu"], "--device: 'tpu' is none of cpu, cuda", id="unknown device"),
    ],
)
def test_what_cannot_be_replayed_says_why_with_status_two(arguments, words):
    refused = replay(*SOURCE, *TOLERANT, *arguments)
    assert refused.exit_code == 2
    assert words in refused.output


def test_without_a_model_the_command_says_what_to_give():
    refused = replay("--log", str(GOLDEN))
    assert refused.exit_code == 2
    assert "--model-path" in refused.output


def test_a_file_that_is_no_log_is_refused_with_status_two(tmp_path):
    (tmp_path / "x.gslog").write_bytes(b"not a log")
    assert replay(*source(tmp_path / "x.gslog")).exit_code == 2
    missing = replay(*source(tmp_path / "missing.gslog"))
    assert missing.exit_code == 2
    assert "cannot be read: No such file or directory" in missing.output.replace("\n", " ")
    assert replay("--model-path", str(MODEL)).exit_code == 2


def test_a_log_that_begins_after_a_model_was_made_says_so(tmp_path):
    def late(frame):
        is_first = getattr(frame, "number", None) in (1, 2) and hasattr(frame, "plan")
        return msgspec.structs.replace(frame, number=frame.number, outcomes=[]) if is_first else frame

    refused = replay(*source(changed(tmp_path / "late.gslog", late)), *TOLERANT)
    assert refused.exit_code == 2
    assert "begins too late" in refused.output
