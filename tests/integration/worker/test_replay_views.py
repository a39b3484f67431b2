"""The debugger before a job's batch, and the tensors around one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.support.golden import FIRST, SECOND, SOURCE, batch_of, replay, replayed

TOLERANT = ["--tolerant", "1e-3"]


def in_debugger(commands: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with what a user types into the debugger."""
    command = [Path(sys.executable).with_name("gradstream"), "replay", *SOURCE, *TOLERANT, *arguments]
    return subprocess.run(command, input=commands, capture_output=True, text=True, check=False)


def test_the_debugger_stops_before_the_job_with_the_model_and_goes_on():
    commands = [
        "p 'step', model.step, model.has_grad, model.model_id",
        "p 'jobs', [one.job.future_id for one in jobs], jobs[0].payload.adam.learning_rate",
        "p 'plan', batch.plan.kind, sorted(engine.models())",
        "next",
        "p 'after', model.step, model.has_grad, len(outcomes)",
        "continue",
    ]
    done = in_debugger("\n".join(commands) + "\n", "--break-at", f"{FIRST}:5")
    assert done.returncode == 0, done.stderr
    assert f"('step', 1, True, '{FIRST}')" in done.stdout
    assert f"('jobs', ['{SECOND}:7', '{FIRST}:5'], 0.01)" in done.stdout
    assert f"('plan', 'optim_step', ['{FIRST}', '{SECOND}'])" in done.stdout
    assert "('after', 2, False, 2)" in done.stdout
    assert "17 jobs equal, 0 differ" in done.stdout


def test_a_weight_that_is_changed_in_the_debugger_changes_what_follows():
    done = in_debugger("model.weights.mul_(2)\ncontinue\n", "--break-at", f"{SECOND}:6", "--to", f"{SECOND}:6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"first difference: batch {batch_of(f'{SECOND}:6')}, forward_backward {SECOND}:6" in done.stdout


def test_leaving_the_debugger_ends_the_replay_with_what_was_compared():
    done = in_debugger("quit\n", "--break-at", f"{FIRST}:5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["stopped"], report["num_equal"]) == (True, 12)
    assert "(Pdb)" in done.stderr


def test_a_dump_holds_a_step_before_and_after(tmp_path):
    directory = tmp_path / "dump"
    replayed(*SOURCE, *TOLERANT, "--dump", str(directory), "--dump-at", f"{FIRST}:5")
    index = json.loads((directory / "index.json").read_text())
    name = FIRST.replace(":", "+")
    before, after = (load_file(directory / f"{name}.{moment}.safetensors") for moment in ("before", "after"))
    entries = {(one["model"], one["moment"]): one for one in index["files"]}
    assert (entries[FIRST, "before"]["step"], entries[FIRST, "before"]["has_grad"]) == (1, True)
    assert (entries[FIRST, "after"]["step"], entries[FIRST, "after"]["has_grad"]) == (2, False)
    grads = {key: value for key, value in before.items() if key.startswith("grad.")}
    assert grads
    assert not any(key.startswith("grad.") for key in after)
    norm = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in grads.values()))
    (job,) = [job for job in index["jobs"] if job["future_id"] == f"{FIRST}:5"]
    assert job["metrics"]["grad_norm"] == pytest.approx(norm, rel=1e-9)
    for key, grad in grads.items():
        site = key.removeprefix("grad.")
        moved = 0.9 * before[f"exp_avg.{site}"] + np.float32(0.1) * grad
        np.testing.assert_allclose(after[f"exp_avg.{site}"], moved, rtol=1e-5, atol=1e-6)
        assert entries[FIRST, "before"]["tensors"][key] == f"float32 {list(grad.shape)}"


def test_a_dump_of_a_pass_holds_what_every_datum_gave(tmp_path):
    directory = tmp_path / "dump"
    done = replayed(*SOURCE, *TOLERANT, "--to", f"{FIRST}:1", "--dump", str(directory))
    name = f"{FIRST}:1".replace(":", "+")
    given, recorded = (load_file(directory / f"{name}.{moment}.safetensors") for moment in ("replayed", "recorded"))
    assert sorted(given) == sorted(recorded)
    losses = [given[key] for key in sorted(given) if key.startswith("elementwise_loss.")]
    assert [len(loss) for loss in losses] == [9, 5]
    (job,) = [job for job in done.jobs if job.future_id == f"{FIRST}:1"]
    assert sum(float(loss.astype(np.float64).sum()) for loss in losses) == pytest.approx(job.replayed_loss, rel=1e-6)


def test_a_dump_is_for_its_owner_and_never_written_over_another(tmp_path):
    directory = tmp_path / "dump"
    replayed(*SOURCE, *TOLERANT, "--to", "1-3", "--dump", str(directory))
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    again = replay(*SOURCE, *TOLERANT, "--to", "1-3", "--dump", str(directory))
    assert again.exit_code == 2
    assert "is not empty" in again.output
