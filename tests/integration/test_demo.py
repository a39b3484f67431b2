"""The demo and the README's loop, run as a user runs them, on the tiny model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.support.example_runs import run_example
from tests.support.polling import wait_until

from examples.local_server import local_server

REPOSITORY = Path(__file__).parent.parent.parent
DATA = REPOSITORY / "examples" / "data"
TINY = REPOSITORY / "configs" / "tiny.yaml"

pytestmark = [pytest.mark.e2e]


def shouted(source: Path, target: Path, *, turns: int) -> Path:
    """The first turns of a file with the replies in capitals: something that the tiny model has yet to learn."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines()[:turns]:
        question, reply = json.loads(line)["messages"]
        lines.append(json.dumps({"messages": [question, {**reply, "content": reply["content"].upper()}]}))
    target.write_text("\n".join(lines), encoding="utf-8")
    return target


def run_demo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_example("examples.speak_shakespeare", "--model", "tiny", *arguments)


def processes_that_name(folder: Path) -> list[str]:
    """Command lines of running processes with folder among their arguments."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(folder) in word for word in words):
            found.append(" ".join(words))
    return found


def test_the_demo_lowers_the_held_out_loss_and_leaves_a_checkpoint_and_no_process(tmp_path):
    data = ["--train-data", str(shouted(DATA / "bard_train.jsonl", tmp_path / "train.jsonl", turns=300))]
    data += ["--test-data", str(shouted(DATA / "bard_test.jsonl", tmp_path / "test.jsonl", turns=60))]
    outputs = tmp_path / "outputs"

    done = run_demo("--steps", "15", "--learning-rate", "1e-2", "--output-dir", str(outputs), *data)

    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (
        float(figure) for figure in re.search(r"held-out loss\D+([\d.]+) -> ([\d.]+)", done.stdout).groups()
    )
    assert after < before - 0.5
    assert list(outputs.rglob("adapter_model.safetensors"))
    assert processes_that_name(outputs) == []


def test_the_demo_says_that_nothing_was_learned(tmp_path):
    done = run_demo("--steps", "1", "--learning-rate", "0", "--test-turns", "4", "--output-dir", str(tmp_path))

    assert done.returncode == 1, done.stdout + done.stderr
    assert "did not fall" in done.stdout


def test_an_example_that_does_not_end_shows_its_stacks_and_the_servers_logs(tmp_path):
    arguments = ["--steps", "100000", "--learning-rate", "0", "--test-turns", "4", "--output-dir", str(tmp_path)]

    def trains() -> bool:
        log = tmp_path / "logs" / "gang.log"
        return log.exists() and '"kind": "forward_backward"' in log.read_text()

    with pytest.raises(pytest.fail.Exception, match="did not end in time") as failure:
        run_example("examples.speak_shakespeare", "--model", "tiny", *arguments, is_late=trains)

    assert "speak_shakespeare.py" in failure.value.msg
    for shown in ("--- server.log", "--- logs/gang.log", "--- logs/api.log", "Current thread"):
        assert shown in failure.value.msg
    # They were killed, and nobody waited for those that the demo had not started itself.
    wait_until(lambda: processes_that_name(tmp_path) == [])


def test_the_demo_shows_why_the_server_did_not_start(tmp_path):
    config = tmp_path / "wrong.yaml"
    config.write_text(TINY.read_text(encoding="utf-8") + "lora_rnk: 8\n", encoding="utf-8")

    done = run_demo("--config", str(config), "--output-dir", str(tmp_path / "outputs"))

    assert done.returncode == 2
    assert "lora_rank" in done.stdout
    assert processes_that_name(tmp_path) == []


def test_the_loop_in_the_readme_lowers_its_loss(tmp_path):
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (program,) = [text for text in programs if "import tinker" in text]

    with local_server(TINY, output_dir=tmp_path / "outputs") as server:
        program = program.replace("http://127.0.0.1:5555", server.url)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=480, check=False
        )

    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2
