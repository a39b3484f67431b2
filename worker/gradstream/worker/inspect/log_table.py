"""Rows of the log on a terminal."""

from collections.abc import Iterable

from rich.table import Table

from gradstream.worker.disklog.verify import Report
from gradstream.worker.inspect.log_rows import FAILED, BatchRow, JobRow
from gradstream.worker.inspect.tables import add_row, age, figure, moment, size, table

_MAX_OWNERS = 3


def job_table(rows: Iterable[JobRow]) -> Table:
    """Jobs, one a line."""
    made = table(
        "jobs",
        ["batch", "ended (UTC)", "job", "op", "tenant"],
        ["tokens", "waited", "batch took", "loss"],
        ["status", "digest"],
    )
    for row in rows:
        add_row(made, _job_cells(row), style="bold" if row.status == FAILED else "")
    return made


def job_line(row: JobRow) -> str:
    """A job in one line, for a log that is followed."""
    batch, ended, job, op, tenant, tokens, waited, took, loss, status, digest = _job_cells(row)
    return f"{ended}  batch {batch}  {job}  {op}  {tenant}  {tokens} tokens  waited {waited}  took {took}  loss {loss}  {status}  {digest}"


def batch_table(rows: Iterable[BatchRow]) -> Table:
    """Batches, one a line."""
    made = table(
        "batches",
        ["batch", "ended (UTC)", "kind"],
        ["jobs", "failed", "tokens", "took", "loss sum"],
        ["owners", "digest"],
    )
    for row in rows:
        more = f" and {len(row.owners) - _MAX_OWNERS} more" if len(row.owners) > _MAX_OWNERS else ""
        counts = [str(row.num_jobs), str(row.num_failed), str(row.tokens), _took(row.batch_ms), figure(row.loss_sum)]
        owners = f"{', '.join(row.owners[:_MAX_OWNERS])}{more}{' (partial)' if row.is_partial else ''}"
        add_row(made, [row.batch, moment(row.done_ms), row.kind, *counts, owners, row.digest[:12]])
    return made


def segment_table(report: Report) -> Table:
    """What `log verify` found of each segment."""
    made = table("segments", ["segment", "state"], ["size", "good", "jobs", "batches"])
    for segment in report.segments:
        sizes = [size(segment.size_bytes), size(segment.good_bytes)]
        counts = [str(segment.frames.get(kind, 0)) for kind in ("job", "batch")]
        add_row(made, [segment.name, segment.state.value, *sizes, *counts])
    return made


def _job_cells(row: JobRow) -> list[str]:
    ended = "-" if row.done_ms is None else moment(row.done_ms)
    waited = "-" if row.done_ms is None or row.at_ms is None else age(max(0, row.done_ms - row.at_ms) / 1000)
    took = "-" if row.batch_ms is None else _took(row.batch_ms)
    status = f"{row.status}: {row.result[:120]}" if row.status == FAILED else row.status
    words = [row.batch or "-", ended, row.future_id, row.op, row.tenant or "-"]
    numbers = ["-" if row.tokens is None else str(row.tokens), waited, took, figure(row.loss)]
    return [*words, *numbers, status, (row.digest or "-")[:12]]


def _took(elapsed_ms: float) -> str:
    return f"{elapsed_ms:.1f} ms" if elapsed_ms < 10_000 else age(elapsed_ms / 1000)
