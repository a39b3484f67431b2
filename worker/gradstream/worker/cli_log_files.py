"""`gradstream log export`, `import` and `verify`: a log as a file that is carried away, and what of a log is whole."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from gradstream.shared.clock import SystemClock
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.cli_errors import fail, readable_errors
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption, place_of
from gradstream.worker.directories import joblog_dir
from gradstream.worker.disklog.archive import archive_frames, export_log, import_log
from gradstream.worker.disklog.errors import NoExport
from gradstream.worker.disklog.frames import Selection
from gradstream.worker.disklog.salvage import AroundDamage
from gradstream.worker.disklog.selection import Choice
from gradstream.worker.disklog.verify import Report, verify, verify_archive
from gradstream.worker.inspect.log_source import batch_id, open_log
from gradstream.worker.inspect.log_table import segment_table
from gradstream.worker.inspect.tables import console, plain, write_json

EXIT_DAMAGED = 1

FileOption = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="FILE",
        help="An exported log instead of a server's.",
        rich_help_panel="Which server",
    ),
]


def export_file(  # noqa: PLR0913 - one parameter an option
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to make.")],
    *,
    model: Annotated[
        list[str] | None, typer.Option("--model", metavar="ID", help="Only this model or sampler; may be given again.")
    ] = None,
    with_neighbours: Annotated[
        bool,
        typer.Option(
            "--with-neighbours", help="Also every model that shared a batch with them: needed to replay the same bits."
        ),
    ] = False,
    start: Annotated[str | None, typer.Option("--start", metavar="BATCH", help="First batch, such as 3-17.")] = None,
    stop: Annotated[str | None, typer.Option("--stop", metavar="BATCH", help="Last batch.")] = None,
    json: JsonOption = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Write the log, or a part of it, into one file. It holds clients' data, and only you may read it."""
    choice = Choice(
        owners=model or None,
        start=_batch_option("--start", start),
        stop=_batch_option("--stop", stop),
        with_neighbours=with_neighbours,
    )
    place = place_of(config, None, output_dir, engine)
    with readable_errors():
        try:
            log = AroundDamage(open_log(place.joblog_dir).directory)
            written = export_log(log, file, choice, clock=SystemClock())
        except FileExistsError:
            fail(f"{file}: is there already; name a file that is not")
        except ValueError as error:
            fail(str(error))
    if json:
        write_json(written)
    else:
        partial = f", {written.num_partial} of them without all their jobs" if written.num_partial else ""
        typer.echo(f"{file}: {written.num_jobs} jobs, {written.num_batches} batches{partial}")
    if (skipped := log.skipped()) is not None:
        fail(skipped)


def import_file(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `log export` made.")],
    output_dir: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory to make the log in.")],
    *,
    engine: EngineOption = None,
    json: JsonOption = False,
) -> None:
    """Make an exported file a log again, for `log`, `replay`, or a server that is to go on from it."""
    with readable_errors():
        try:
            head = next(archive_frames(file))
            assert isinstance(head, Selection), "archive_frames yields it first"
        except OSError as error:
            fail(f"{file}: cannot be read: {error.strerror}")
        target = joblog_dir(output_dir, engine or head.engine)
        try:
            selection = import_log(file, target)
        except FileExistsError:
            fail(f"{target}: holds a log already; name another directory")
    if json:
        write_json({"directory": str(target), "selection": selection})
    else:
        typer.echo(target)


def verify_log(
    *,
    json: JsonOption = False,
    file: FileOption = None,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Compute every checksum and digest again. Status 1 when something is damaged.

    `torn` and `void` are no damage: that is what a kill, and a gang that had lost its lease, leave behind.
    """
    if file is not None:
        with readable_errors():
            try:
                report = verify_archive(file)
            except NoExport as error:
                fail(f"--file: {error.path}: {error.reason}; give a file that `gradstream log export` made")
            except OSError as error:
                fail(f"--file: {file} cannot be read: {error.strerror}")
    else:
        with readable_errors():
            report = verify(open_log(place_of(config, None, output_dir, engine).joblog_dir).directory)
    if json:
        write_json(_as_json(report))
    else:
        _print(report)
    if not report.is_sound:
        raise typer.Exit(EXIT_DAMAGED)


def _as_json(report: Report) -> dict[str, object]:
    first, last = (None if batch is None else str(batch) for batch in (report.first, report.last))
    return {
        "is_sound": report.is_sound,
        "first": first,
        "last": last,
        "num_outcomes": report.num_outcomes,
        "problems": report.problems,
        "segments": report.segments,
    }


def _print(report: Report) -> None:
    if report.segments:
        console().print(segment_table(report))
    for problem in report.problems:
        sys.stderr.write(f"error: {plain(problem)}\n")
    verdict = "sound" if report.is_sound else f"{len(report.problems)} problem(s)"
    range_ = "no batch" if report.first is None else f"batches {report.first} to {report.last}"
    typer.echo(f"{verdict}: {range_}, {report.num_outcomes} outcomes")


def _batch_option(name: str, text: str | None) -> BatchId | None:
    if text is None:
        return None
    batch = batch_id(text)
    if batch is None:
        fail(f"{name}: {text!r} is not a batch such as 3-17")
    return batch
