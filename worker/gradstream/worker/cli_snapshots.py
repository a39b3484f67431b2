"""`gradstream snapshots`: from where a gang can go on."""

import sys
from typing import Annotated

import typer
from rich.table import Table

from gradstream.shared.clock import SystemClock
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.cli_errors import fail, readable_errors
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption, place_of
from gradstream.worker.disklog.frames import LoggedBatch
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.segments import segment_paths
from gradstream.worker.inspect.place import Place, engines_in, names_of
from gradstream.worker.inspect.snapshot_rows import SnapshotRow, snapshot_rows
from gradstream.worker.inspect.tables import add_row, age, console, moment, plain, size, table, write_json

EXIT_DAMAGED = 1


def snapshots(
    *,
    model: Annotated[
        str | None, typer.Option("--model", metavar="ID", help="Only snapshots that hold this model.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every file, compare hashes, and look each batch up in the log.")
    ] = False,
    json: JsonOption = False,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
) -> None:
    """List the snapshots, newest first: after which batch, how old, which models, how large. Status 1 when --verify finds damage."""
    place = place_of(config, None, output_dir, engine)
    with readable_errors():
        directory = place.snapshots_dir
        if not directory.is_dir():
            engines = engines_in(directory.parent)
            others = f"; there are some of the engine(s) {names_of(engines)}: give --engine" if engines else ""
            fail(
                f"{directory}: there are no snapshots; the gang makes the first after some training, or when it stops{others}"
            )
        rows = snapshot_rows(directory, verify=verify, batches=_batches(place) if verify else None)
    if model is not None:
        rows = _with_model(rows, model)
    if json:
        write_json(rows)
    else:
        _print(rows, now_ms=SystemClock().wall_ms(), model=model)
    if any(row.is_valid is False for row in rows):
        raise typer.Exit(EXIT_DAMAGED)


def _with_model(rows: list[SnapshotRow], model: str) -> list[SnapshotRow]:
    """The snapshots that hold a model; ends the command when none does."""
    found = [row for row in rows if any(one.model == model for one in row.models)]
    if not found:
        held = sorted({one.model for row in rows for one in row.models})
        fail(f"--model: no snapshot holds {model}; they hold {names_of(held)}")
    return found


def _print(rows: list[SnapshotRow], *, now_ms: int, model: str | None) -> None:
    made = table(
        "snapshots", ["after batch", "made (UTC)"], ["age", "models", "size", "own"], ["log goes on at", "verified"]
    )
    for row in rows:
        verdict = {None: "-", True: "yes", False: "NO"}[row.is_valid]
        sizes = [str(len(row.models)), size(row.size_bytes), size(row.own_bytes)]
        when = [moment(row.created_ms), age((now_ms - row.created_ms) / 1000)] if row.created_ms else ["-", "-"]
        place = f"{row.log_segment}:{row.log_offset}" if row.log_segment else "-"
        add_row(made, [row.batch, *when, *sizes, place, verdict])
    out = console()
    out.print(made if rows else "no snapshots")
    for row in rows:
        if row.problem is not None:
            sys.stderr.write(f"error: {row.file}: {plain(row.problem)}\n")
    shown = [row for row in rows if row.models]
    if shown:
        out.print()
        out.print(_models(shown[0], model=model))


def _models(row: SnapshotRow, *, model: str | None) -> Table:
    """The models of one snapshot."""
    made = table(f"models of {row.batch}", ["model", "tenant", "kind"], ["step", "size"], ["gradient", "files"])
    for one in row.models:
        if model is None or one.model == model:
            grad = "accumulated" if one.has_grad else "-"
            add_row(made, [one.model, one.tenant, one.kind, str(one.step), size(one.size_bytes), grad, one.directory])
    return made


def _batches(place: Place) -> set[BatchId] | None:
    """The batches of the log, None when there is no log beside the snapshots. Raises LogDamaged."""
    if not segment_paths(place.joblog_dir):
        return None
    return {frame.batch_id for _, frame in DiskLog(place.joblog_dir).scan() if isinstance(frame, LoggedBatch)}
