"""A command line that cannot be read is one line on stderr and status 2."""

import pytest
import typer

from gradstream.worker import cli_log
from gradstream.worker.cli_errors import run_app

app = typer.Typer(name="gradstream", no_args_is_help=True, add_completion=False)
app.add_typer(cli_log.app, name="log")


@app.command()
def fine(*, status: int = 0) -> None:
    raise typer.Exit(status)


@app.command()
def aborted() -> None:
    raise typer.Abort


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        run_app(app, list(arguments), prog_name="gradstream")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["log", "list", "--foo"], ["--foo", "`gradstream log list --help`"], id="option"),
        pytest.param(["log", "lst"], ["'lst'", "`gradstream log --help`"], id="command"),
        pytest.param(["log", "show"], ["ID", "`gradstream log show --help`"], id="argument missing"),
        pytest.param(["log", "list", "--limit", "x"], ["--limit", "`gradstream log list --help`"], id="value"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_the_help(capsys, arguments, named):
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    for word in named:
        assert word in line


def test_a_group_without_a_command_prints_its_help(capsys):
    assert run("log") == 2
    told = capsys.readouterr()
    assert "verify" in told.out + told.err


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_commands_status_is_that_of_the_process(status):
    assert run("fine", "--status", str(status)) == status


def test_a_command_that_is_broken_off_has_status_1(capsys):
    assert run("aborted") == 1
    assert capsys.readouterr().err == "aborted\n"
