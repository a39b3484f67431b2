"""The gradstream command: what it prints, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gradstream.worker.cli import app

ROOT = Path(__file__).parents[3]
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_help_names_every_command_and_an_example() -> None:
    result = RUNNER.invoke(app, ["--help"])
    assert result.exit_code == 0
    for word in ("serve", "config", "models", "gradstream serve --config configs/tiny.yaml"):
        assert word in result.output


def test_the_help_of_serve_shows_how_to_override_a_field() -> None:
    result = RUNNER.invoke(app, ["serve", "--help"])
    for word in ("--server.FIELD", "--api-port", "--master-addr", "--operation-timeout"):
        assert word in result.output


def test_a_server_can_be_started_as_a_module() -> None:
    command = [sys.executable, "-m", "gradstream.launcher", "--mode", "auto", "--config", "nowhere.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (2, "error: nowhere.yaml: cannot be read: No such file or directory\n")


def test_the_version_is_that_of_the_package() -> None:
    assert RUNNER.invoke(app, ["--version"]).output.startswith("gradstream 0.")


def test_the_command_starts_without_torch_and_without_web_frameworks() -> None:
    code = "import sys, gradstream.worker.cli; print(sorted({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_good_config_is_said_to_be_good() -> None:
    result = RUNNER.invoke(app, ["config", "check", "configs/tiny.yaml"])
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "configs/tiny.yaml can be served")


def test_a_config_is_checked_and_shown_with_what_serve_would_be_given_beside_it() -> None:
    shown = RUNNER.invoke(app, ["config", "show", "configs/tiny.yaml", "--server.lora_rank", "4"])
    assert "lora_rank: 4  # set" in shown.output.splitlines()
    checked = RUNNER.invoke(app, ["config", "check", "configs/tiny.yaml", "--server.tensor_parallel_size=2"])
    assert checked.exit_code == 2
    assert checked.stderr.startswith("error: tensor_parallel_size: 2 asks for tensor parallelism")
    unknown = RUNNER.invoke(app, ["config", "check", "configs/tiny.yaml", "--lora_rank", "4"])
    assert unknown.stderr.startswith("error: --lora_rank: unknown argument")


def test_shown_values_are_marked_when_the_file_sets_them() -> None:
    lines = RUNNER.invoke(app, ["config", "show", "configs/tiny.yaml"]).output.splitlines()
    assert "enable_lora: true  # set" in lines
    assert "seed: 42" in lines


def test_the_reference_of_fields_can_be_printed() -> None:
    printed = RUNNER.invoke(app, ["config", "docs"]).output
    assert "| `storage_limit` | `10TB` | Disk space that output_dir may take; saves beyond it fail. | " in printed


@pytest.mark.parametrize(
    "command", [["serve", "--config"], ["config", "check"], ["config", "show"]], ids=["serve", "check", "show"]
)
def test_a_mistake_in_the_config_is_one_readable_line_and_status_2(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model_path: x/y\nenable_lora: true\nlora_rnk: 3\n")
    result = RUNNER.invoke(app, [*command, str(path)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {path}:3: unknown field 'lora_rnk'; did you mean lora_rank?\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--server.lora_rnk", "3"],
            "--server.lora_rnk: unknown field 'lora_rnk'; did you mean lora_rank?",
            id="field",
        ),
        pytest.param(
            ["--api-port", "x"], "--server.api_port: api_port: 'x' is not an integer from 1 to 65535", id="port"
        ),
        pytest.param(["--api-prt", "5"], "--api-prt: unknown argument", id="option"),
        pytest.param(["--api-port=5", "--server.api_port=6"], "--server.api_port: is given twice", id="twice"),
        pytest.param(
            ["--nnodes", "2"], "--master-addr: missing: 2 nodes meet at an address of this machine", id="address"
        ),
        pytest.param(["--nnodes", "0"], "--nnodes: 0 is no number of machines", id="nodes"),
        pytest.param(
            ["--nnodes", "2", "--master-addr", "h"], "--nnodes: 2 nodes cannot share num_ranks: 1 evenly", id="split"
        ),
        pytest.param(["--mode", "conect"], "--mode: 'conect' is not a mode; use auto, which", id="mode"),
        pytest.param(
            ["--server.tensor_parallel_size=2"], "tensor_parallel_size: 2 asks for tensor parallelism", id="unsupported"
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_named(arguments: list[str], message: str) -> None:
    result = RUNNER.invoke(app, ["serve", "--config", "configs/tiny.yaml", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message}")


def test_an_unknown_packaged_model_is_refused_with_the_known_ones() -> None:
    result = RUNNER.invoke(app, ["models", "fetch", "nothing"])
    assert result.exit_code == 2
    assert "use one of smollm2-135m-instruct" in result.stderr
