"""`gradstream bisect`: the first job of a log at which something holds."""

import sys
from typing import Annotated

import typer

from gradstream.worker.cli_errors import fail
from gradstream.worker.cli_place import ConfigOption, DirOption, EngineOption, JsonOption
from gradstream.worker.cli_replay import (
    DeviceOption,
    LogOption,
    ModelOption,
    ModelPathOption,
    TolerantOption,
    ToOption,
    replay_errors,
)
from gradstream.worker.inspect.describe import text_lines
from gradstream.worker.inspect.log_table import batch_table
from gradstream.worker.inspect.tables import console, plain, write_json
from gradstream.worker.replaying.bisecting import Finding, bisect
from gradstream.worker.replaying.conditions import (
    Condition,
    digest_differs,
    loss_above,
    recorded_non_finite,
    state_non_finite,
)
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.expression import expression
from gradstream.worker.replaying.extent import Want
from gradstream.worker.replaying.source import Where

EXIT_NOT_FOUND = 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command("bisect")
def bisect_log(  # noqa: PLR0913 - one parameter an option
    *,
    non_finite: Annotated[
        bool, typer.Option("--non-finite", help="nan or inf in a loss, an output, a gradient, weights or moments.")
    ] = False,
    digest: Annotated[
        bool, typer.Option("--digest-differs", help="A replay gives something else than was recorded.")
    ] = False,
    above: Annotated[float | None, typer.Option("--loss-above", metavar="X", help="The loss exceeds X.")] = None,
    expr: Annotated[
        str | None,
        typer.Option("--expr", metavar="PYTHON", help="Your own expression is true, such as 'grad_norm > 10'."),
    ] = None,
    recorded_only: Annotated[
        bool, typer.Option("--recorded-only", help="With --non-finite: look at what was recorded, replay nothing.")
    ] = False,
    goes_on: Annotated[
        bool,
        typer.Option("--goes-on", help="With --expr on weights: once it holds it holds on, so snapshots save replays."),
    ] = False,
    model: ModelOption = None,
    to: ToOption = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="WHERE",
            help="Of a replay: start, snapshot, or the batch of a snapshot (default: earliest).",
        ),
    ] = None,
    tolerant: TolerantOption = None,
    json: JsonOption = False,
    log: LogOption = None,
    config: ConfigOption = None,
    output_dir: DirOption = None,
    engine: EngineOption = None,
    model_path: ModelPathOption = None,
    device: DeviceOption = None,
) -> None:
    """Find the first job at which a condition holds, and show it with its payload in short and the batches next to it.

    What was recorded (loss, metrics, outputs, errors) is only read. Weights, gradient and digests need a replay in this process.
    --expr runs Python that you wrote, on your machine; nothing from the log is ever evaluated.
    Exit status: 0 found, 1 not found, 2 it cannot be told.
    """
    if sum((non_finite, digest, above is not None, expr is not None)) != 1:
        fail("--non-finite, --digest-differs, --loss-above X, --expr PYTHON: give one of them")
    want = Want(to=to, model=model, begin=begin, tolerance=tolerant)
    where = Where(config=config, output_dir=output_dir, engine=engine, file=log, model_path=model_path, device=device)
    with replay_errors():
        if non_finite:
            condition = recorded_non_finite() if recorded_only else state_non_finite()
        elif digest:
            condition = digest_differs()
        else:
            condition = expression(expr) if expr is not None else loss_above(above or 0.0)
        if goes_on and condition.in_state is None:
            raise CannotReplay("--goes-on: is for expressions on a model's tensors alone, such as 'weights.norm() > 3'")
        scan = recorded_non_finite() if non_finite else None
        found = bisect(where, want, condition, goes_on=goes_on or non_finite, scan=scan)
    if json:
        write_json(found)
    else:
        _print(found, condition)
    if not found.found:
        raise typer.Exit(EXIT_NOT_FOUND)


def _print(found: Finding, condition: Condition) -> None:
    for remark in found.remarks:
        sys.stderr.write(f"note: {plain(remark)}\n")
    how = "as recorded" if found.replayed_from is None else f"replayed from {found.replayed_from}"
    if not found.found or found.job is None:
        typer.echo(f"not found: {plain(condition.name)}, in {found.num_jobs} jobs {how}")
        return
    typer.echo(
        f"found: {plain(found.what or '')}\n{found.future_id} in batch {found.batch}, after {found.num_jobs} jobs {how}"
    )
    out = console()
    out.print("\n".join(plain(line) for line in text_lines(found.job)))
    for title, row in (("the model's batch before", found.before), ("the model's batch after", found.after)):
        table = batch_table([] if row is None else [row])
        table.title = title if row is not None else f"{title}: none"
        out.print(table)
