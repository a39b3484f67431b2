"""`gradstream replay`: a log run again in a fresh engine, compared job by job."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gradstream.worker.cli_errors import fail, readable_errors
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption
from gradstream.worker.inspect.tables import console, plain, write_json
from gradstream.worker.replaying.errors import CannotReplay, Stopped
from gradstream.worker.replaying.extent import Want
from gradstream.worker.replaying.report import ReplayReport, report, result_table, summary
from gradstream.worker.replaying.results import JobResult
from gradstream.worker.replaying.session import Session, open_session
from gradstream.worker.replaying.source import Where
from gradstream.worker.replaying.watch import Watch, Wishes

EXIT_DIVERGED = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

LogOption = Annotated[
    Path | None,
    typer.Option(
        "--log",
        "--file",
        metavar="FILE",
        help="An exported log instead of a server's own.",
        rich_help_panel="Which server",
    ),
]
ModelPathOption = Annotated[
    str | None,
    typer.Option(
        "--model-path",
        metavar="DIR",
        help="The base model, where no config names it.",
        rich_help_panel="Which server",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu or cuda; instead of the config's.")
]
ToOption = Annotated[
    str | None,
    typer.Option("--to", metavar="JOB", help="The last job, by its future, or the last batch, such as 3-17."),
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="WHERE",
        help="start, snapshot, or the batch of a snapshot (default: the newest snapshot that leads there, else the start).",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="ID", help="Only this model, and those whose jobs ran in one batch with its own."),
]
TolerantOption = Annotated[
    float | None,
    typer.Option(
        "--tolerant", min=0, metavar="X", help="Numbers may differ by X; needed for logs of another kind of engine."
    ),
]


@app.command()
def replay(  # noqa: PLR0913 - one parameter an option
    *,
    to: ToOption = None,
    begin: FromOption = None,
    model: ModelOption = None,
    tolerant: TolerantOption = None,
    samples: Annotated[bool, typer.Option("--samples", help="Run samples too.")] = False,
    break_at: Annotated[
        str | None,
        typer.Option(
            "--break-at", metavar="JOB", help="Open pdb right before this job's batch: engine, model, batch, jobs."
        ),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option("--dump", metavar="DIR", help="Write the tensors before and after a batch there.")
    ] = None,
    dump_at: Annotated[
        str | None,
        typer.Option("--dump-at", metavar="JOB", help="The job or batch that --dump is of (default: the last one)."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="List the last N jobs; 0 for all.")] = 50,
    json: JsonOption = False,
    log: LogOption = None,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
    model_path: ModelPathOption = None,
    device: DeviceOption = None,
) -> None:
    """Run a log again in a fresh engine in this process and compare each job's outcome with the one that it had.

    The server's files are only read, so it may go on running; what is saved meanwhile goes to a temporary directory.
    Exit status: 0 all equal, 1 something differs, 2 it cannot be replayed.
    """
    want = Want(
        to=to,
        model=model,
        begin=begin,
        also=[text for text in (break_at, dump_at) if text is not None],
        tolerance=tolerant,
        samples=samples,
    )
    where = Where(config=config, output_dir=output_dir, engine=engine, file=log, model_path=model_path, device=device)
    if dump_at is not None and dump is None:
        fail("--dump-at: says of which job, and --dump DIR where to write; give both")
    with replay_errors(), open_session(where, want) as session:
        say_remarks(session)
        Watch(session, Wishes(break_at=break_at, dump=dump, dump_at=dump_at, json=json)).open()
        done = _run(session)
    if json:
        write_json(done)
    else:
        console().print(result_table(done.jobs, limit=limit))
        typer.echo(plain_lines(summary(done)))
    if done.num_differing:
        raise typer.Exit(EXIT_DIVERGED)
    if to is None and session.seen.damage is not None:
        fail(f"what comes after batch {session.seen.batches[-1].batch} could not be read, and was not compared")


@contextmanager
def replay_errors() -> Iterator[None]:
    """Everything that keeps a log from being replayed, as `error: ...` and status 2."""
    with readable_errors():
        try:
            yield
        except CannotReplay as error:
            fail(str(error))


def say_remarks(session: Session) -> None:
    """What the user should know, on stderr."""
    for remark in session.remarks:
        sys.stderr.write(f"note: {plain(remark)}\n")


def plain_lines(text: str) -> str:
    """Lines whose words cannot steer the terminal."""
    return "\n".join(map(plain, text.split("\n")))


def _run(session: Session) -> ReplayReport:
    """Run all of it, or up to where the user leaves the debugger."""
    jobs: list[JobResult] = []
    stopped = False
    try:
        for number, ran in enumerate(session.run(), start=1):
            jobs += ran.results
            _say_progress(f"batch {ran.past.batch}, {number} of {len(session.extent.notes)}")
    except Stopped:
        stopped = True
        sys.stderr.write("note: stopped in the debugger\n")
    return report(session, jobs, stopped=stopped)


def _say_progress(text: str) -> None:
    """In one line of a terminal, which the next one takes."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}\r")
