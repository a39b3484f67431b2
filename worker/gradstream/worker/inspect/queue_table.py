"""The queue on a terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from gradstream.shared.ids import seq_text
from gradstream.shared.joblog.queue_look import HeldJob, OwnerQueue, QueuedJob, QueueLook, TenantQueue
from gradstream.worker.inspect.tables import add_row, age, plain, size, table


def queue_table(look: QueueLook, *, limit: int) -> Group:
    """Totals, what runs, tenants, owners, and the first `limit` jobs of each kind."""
    parts: list[RenderableType] = [Text(line) for line in _lines(look)]
    if look.tenants:
        parts += [Text(""), _tenants(look.tenants)]
    if look.owners:
        parts += [Text(""), _owners(look.owners)]
    if look.jobs:
        parts += [Text(""), _jobs(look.jobs[:limit])]
        parts += _rest(look.jobs, limit, "queued")
    if look.held:
        parts += [Text(""), _held(look.held[:limit])]
        parts += _rest(look.held, limit, "held")
    return Group(*parts)


def _lines(look: QueueLook) -> list[str]:
    gang = look.gang
    works = (
        f"gang {gang.epoch} of {gang.lease_owner} leads, its lease has {gang.lease_left_s:.1f} s"
        if gang.lease_left_s > 0
        else "no gang leads: jobs wait until one does"
    )
    rate = "no job has ended yet" if not look.job_ms else f"{1000 / look.job_ms:.1f} jobs/s lately"
    last = "" if look.last_batch is None else f"; last batch {look.last_batch}, {age(look.last_done_s)} ago"
    name = "" if gang.base_model is None else f" ({gang.base_model})"
    lines = [
        f"engine {look.engine}{name}: {works}",
        f"{look.num_jobs} jobs wait or run, {size(look.bytes)}; {rate}{last}",
        f"now: {_now(look)}",
    ]
    if look.is_cut:
        lines.append("the queue is longer than what is listed here; the totals above count everything")
    return [plain(line) for line in lines]


def _now(look: QueueLook) -> str:
    running = look.running
    if running is None:
        return "nothing is known to run"
    batch = "" if running.batch is None else f" in batch {running.batch}"
    since = "" if running.for_s is None else f" for {age(running.for_s)}"
    shown = ", ".join(running.future_ids[:4]) + (" ..." if len(running.future_ids) > 4 else "")
    return f"{len(running.future_ids)} {running.op or ''} job(s) run{batch}{since}: {shown}".replace("  ", " ")


def _tenants(tenants: Sequence[TenantQueue]) -> RenderableType:
    made = table("tenants", ["tenant"], ["jobs", "stored"])
    for tenant in tenants:
        add_row(made, [tenant.tenant, str(tenant.num_jobs), size(tenant.bytes)])
    return made


def _owners(owners: Sequence[OwnerQueue]) -> RenderableType:
    made = table(
        "models and samplers",
        ["owner", "tenant", "state"],
        ["queued", "held", "running", "tokens", "stored", "oldest", "applied", "next seq"],
    )
    for owner in owners:
        numbers = [owner.num_queued, owner.num_held, owner.num_running, owner.tokens]
        positions = ["-" if seq is None else str(seq) for seq in (owner.applied, owner.next_seq)]
        add_row(
            made,
            [
                owner.owner,
                owner.tenant,
                owner.state or "-",
                *map(str, numbers),
                size(owner.bytes),
                age(owner.oldest_s),
                *positions,
            ],
        )
    return made


def _jobs(jobs: Sequence[QueuedJob]) -> RenderableType:
    made = table(
        "queued, by arrival", ["#", "op", "owner", "tenant"], ["seq", "in owner", "age", "tokens", "stored"], ["note"]
    )
    for job in jobs:
        numbers = [_seq(job.owner, job.seq), str(job.place_in_owner), age(job.age_s), str(job.tokens), size(job.bytes)]
        add_row(
            made,
            [str(job.place), job.op, job.owner, job.tenant, *numbers, _note(job)],
            style="bold" if job.is_running else "",
        )
    return made


def _held(held: Sequence[HeldJob]) -> RenderableType:
    made = table(
        "held: an earlier one is missing", ["op", "owner", "tenant"], ["seq", "waits for", "age", "tokens", "stored"]
    )
    for job in held:
        numbers = [seq_text(job.seq), seq_text(job.waits_for_seq), age(job.age_s), str(job.tokens), size(job.bytes)]
        add_row(made, [job.op, job.owner, job.tenant, *numbers])
    return made


def _note(job: QueuedJob) -> str:
    notes = ["running"] if job.is_running else []
    before = job.starts - job.is_running
    if before > 0:
        notes.append(f"{before} gang(s) died while it ran")
    return ", ".join(notes)


def _seq(owner: str, seq: int) -> str:
    """Samplers' seqs have no lanes."""
    return str(seq) if ":sample:" in owner else seq_text(seq)


def _rest(jobs: Sequence[object], limit: int, kind: str) -> list[RenderableType]:
    left = len(jobs) - limit
    return [Text(f"... and {left} more {kind}; --limit 0 lists all")] if left > 0 else []
