"""A replay's results as a table, and as JSON."""

from collections.abc import Sequence

import msgspec
from rich.table import Table

from gradstream.shared.joblog.port import BatchId
from gradstream.worker.inspect.tables import add_row, figure, table
from gradstream.worker.replaying.results import JobResult
from gradstream.worker.replaying.session import Session


class ReplayReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay did. begin: the batch of the snapshot that it began after, None for the start of the log.

    remarks: what the user should know. stopped: the user left the debugger. tolerance None: every byte was compared.
    """

    source: str
    begin: str | None
    end: str
    fingerprint: str
    tolerance: float | None
    num_batches: int
    num_equal: int
    num_differing: int
    num_not_run: int
    jobs: list[JobResult]
    models: list[str] | None = None
    remarks: list[str] = []
    stopped: bool = False

    @property
    def first_difference(self) -> JobResult | None:
        return next((job for job in self.jobs if job.verdict == "differs"), None)


def report(session: Session, jobs: Sequence[JobResult], *, stopped: bool) -> ReplayReport:
    """The report of a session whose batches gave these results."""
    cut, owners = session.extent.cut, session.extent.owners

    def count(verdict: str) -> int:
        return sum(job.verdict == verdict for job in jobs)

    return ReplayReport(
        source=session.source.name,
        begin=None if cut is None else str(BatchId(*cut.id)),
        end=str(session.extent.last),
        fingerprint=session.fingerprint,
        tolerance=session.want.tolerance,
        num_batches=len({job.batch for job in jobs}),
        num_equal=count("equal"),
        num_differing=count("differs"),
        num_not_run=count("not_run"),
        jobs=list(jobs),
        models=None if owners is None else sorted(owners),
        remarks=session.remarks,
        stopped=stopped,
    )


def result_table(jobs: Sequence[JobResult], *, limit: int) -> Table:
    """The last jobs, and every one that differs."""
    made = table("replayed", ["batch", "job", "op"], ["loss", "ms", "ms then"], ["digest"])
    for number, job in enumerate(jobs):
        if limit and number < len(jobs) - limit and job.verdict != "differs":
            continue
        numbers = [figure(job.loss), _ms(job.ms), _ms(job.recorded_ms)]
        style = "bold red" if job.verdict == "differs" else "dim" if job.verdict == "not_run" else ""
        add_row(made, [job.batch, job.future_id, job.op, *numbers, _verdict(job)], style=style)
    return made


def summary(done: ReplayReport) -> str:
    """One sentence on the whole."""
    begin = "the start of the log" if done.begin is None else f"the snapshot after {done.begin}"
    what = f"{done.num_equal} jobs equal, {done.num_differing} differ, {done.num_not_run} not run"
    how = "every byte compared" if done.tolerance is None else f"compared within {done.tolerance:g}"
    text = f"from {begin} to {done.end}: {what}; {how}"
    if (first := done.first_difference) is not None:
        text += f"\nfirst difference: batch {first.batch}, {first.op} {first.future_id}: {first.what}"
    return text


def _verdict(job: JobResult) -> str:
    if job.verdict == "equal":
        return f"equal {job.digest[:12]}" if job.digest == job.replayed_digest else "within the tolerance"
    return f"DIFFERS: {job.what}" if job.verdict == "differs" else f"not run: {job.what}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
