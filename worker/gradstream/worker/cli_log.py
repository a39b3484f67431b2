"""`gradstream log`: the job log on disk, listed, shown and followed."""

from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from gradstream.shared.clock import SystemClock
from gradstream.shared.ids import FutureId
from gradstream.worker.cli_dead import write_payload
from gradstream.worker.cli_errors import fail, readable_errors
from gradstream.worker.cli_log_files import FileOption, export_file, import_file, verify_log
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption, place_of
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.salvage import AroundDamage
from gradstream.worker.inspect.describe import text_lines
from gradstream.worker.inspect.log_rows import JobPairer, JobRow, Wanted, batch_row, batches_in, jobs_in
from gradstream.worker.inspect.log_show import find_batch, find_job
from gradstream.worker.inspect.log_source import Following, Frames, batch_id, open_log, since_ms
from gradstream.worker.inspect.log_table import batch_table, job_line, job_table
from gradstream.worker.inspect.place import CannotLook, names_of
from gradstream.worker.inspect.tables import console, plain, write_json

app = typer.Typer(
    help="The job log on disk: list, show, follow, export, import, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("export")(export_file)
app.command("import")(import_file)
app.command("verify")(verify_log)

ModelOption = Annotated[str | None, typer.Option("--model", metavar="ID", help="Only this model or sampler.")]
OpOption = Annotated[str | None, typer.Option("--op", metavar="OP", help="Only this op, such as optim_step.")]
TenantOption = Annotated[str | None, typer.Option("--tenant", metavar="NAME", help="Only this tenant.")]
FailedOption = Annotated[bool, typer.Option("--failed", help="Only jobs that failed.")]


@app.command("list")
def list_log(  # noqa: PLR0913 - one parameter an option
    *,
    model: ModelOption = None,
    op: OpOption = None,
    tenant: TenantOption = None,
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="10m, 2h, 3d ago, or a date or time (UTC).")
    ] = None,
    failed: FailedOption = False,
    still_open: Annotated[bool, typer.Option("--open", help="Only jobs without an outcome.")] = False,
    batches: Annotated[bool, typer.Option("--batches", help="Batches instead of jobs: those with such a job.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=0, metavar="N", help="The last N; 0 for all.")] = 50,
    json: JsonOption = False,
    file: FileOption = None,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Jobs, or batches, with times, tokens, loss and digests: in the order in which they ended, open jobs last."""
    frames = _frames(file, config, output_dir, engine)
    try:
        after_ms = since_ms(since, now_ms=SystemClock().wall_ms())
    except ValueError as error:
        fail(f"--since: {error}")
    wanted = Wanted(model=model, op=op, tenant=tenant, since_ms=after_ms, failed=failed, is_open=still_open)
    with readable_errors():
        if batches:
            found = [batch_row(*one) for one in deque(batches_in(frames, wanted), maxlen=limit or None)]
            _check_model(frames, model, is_found=bool(found))
            write_json(found) if json else console().print(batch_table(found) if found else "no such batches")
        else:
            rows = [one.row() for one in deque(jobs_in(frames, wanted), maxlen=limit or None)]
            _check_model(frames, model, is_found=bool(rows))
            write_json(rows) if json else console().print(job_table(rows) if rows else "no such jobs")
        if frames.skipped is not None:
            fail(frames.skipped)


def _check_model(frames: Frames, model: str | None, *, is_found: bool) -> None:
    """Refuse a model or sampler that the log has nothing of, with those that it has."""
    if model is None or is_found:
        return
    owners = sorted({one.owner for one in jobs_in(frames, Wanted())})
    if model not in owners:
        raise CannotLook(f"--model: no job of {model} is in this log; there are jobs of {names_of(owners)}")


@app.command()
def show(  # noqa: PLR0913 - one parameter an option
    what: Annotated[str, typer.Argument(metavar="ID", help="A job's future, or a batch such as 3-17.")],
    *,
    payload: Annotated[
        Path | None, typer.Option("--payload", metavar="FILE", help="Write the job's body there too, as msgpack.")
    ] = None,
    json: JsonOption = False,
    file: FileOption = None,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """One job: its payload in short, plan, outcome and metrics. Or one batch: its plan, jobs and records."""
    frames = _frames(file, config, output_dir, engine)
    with readable_errors():
        named = batch_id(what)
        found = find_job(frames, FutureId(what)) if named is None else find_batch(frames, named)
        if found is None:
            if frames.skipped is not None:
                fail(f"{what}: is not in what reads of this log; {frames.skipped}")
            fail(f"{what}: is not in this log; `gradstream log list` shows what is")
    if payload is not None:
        if not found.payload:
            fail(f"--payload: {what} has no body here")
        write_payload(payload, found.payload)
    if json:
        write_json(found.shown)
    else:
        console().print("\n".join(plain(line) for line in text_lines(found.shown)))
    if frames.skipped is not None:
        fail(frames.skipped)


@app.command()
def follow(  # noqa: PLR0913 - one parameter an option
    *,
    model: ModelOption = None,
    op: OpOption = None,
    tenant: TenantOption = None,
    failed: FailedOption = False,
    tail: Annotated[int, typer.Option("--tail", min=0, metavar="N", help="Begin with the last N jobs.")] = 10,
    every: Annotated[float, typer.Option("--every", min=0.05, metavar="S", help="Seconds between two looks.")] = 0.5,
    json: JsonOption = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """Print each job as it ends, until Ctrl-C. With --json a line of JSON each."""
    with readable_errors(), suppress(KeyboardInterrupt, BrokenPipeError):
        log = open_log(place_of(config, None, output_dir, engine).joblog_dir)
        wanted = Wanted(model=model, op=op, tenant=tenant, failed=failed)
        _follow(log, wanted, tail=tail, every_s=every, json=json)


def _follow(log: DiskLog, wanted: Wanted, *, tail: int, every_s: float, json: bool) -> None:
    pairer = JobPairer()

    def restart() -> None:
        nonlocal pairer
        pairer = JobPairer()

    following = Following(log, on_restart=restart)
    first = deque((one for frame, _ in following.new() for one in pairer.take(frame) if wanted.takes(one)), maxlen=tail)
    out = console()

    def say(row: JobRow) -> None:
        if json:
            write_json(row, line=True)
        else:
            out.print(plain(job_line(row)), soft_wrap=True)

    for one in first:
        say(one.row())
    for frame, is_news in following.forever(every_s=every_s):
        for one in pairer.take(frame):
            if is_news and wanted.takes(one):
                say(one.row())


def _frames(file: Path | None, config: Path | None, output_dir: Path | None, engine: str | None) -> Frames:
    if file is not None:
        return Frames(file=file)
    with readable_errors():
        return Frames(log=AroundDamage(open_log(place_of(config, None, output_dir, engine).joblog_dir).directory))
