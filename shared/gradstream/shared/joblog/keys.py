"""The names of an engine's Redis keys. All carry one hash tag, so that they share a cluster slot."""

from dataclasses import dataclass

from gradstream.shared.ids import FutureId, ModelId, OwnerId, SamplerId, TenantId, is_valid_name, lane_of
from gradstream.shared.joblog.port import RecordKind


@dataclass(frozen=True, slots=True)
class Keys:
    """Key names of one engine. The Lua scripts derive the same names from `prefix`."""

    engine: str = "main"

    def __post_init__(self) -> None:
        if not is_valid_name(self.engine):
            raise ValueError(f"engine name {self.engine!r}: use letters, digits, dot, dash and underscore")

    @property
    def prefix(self) -> str:
        return f"gs:{{{self.engine}}}:"

    @property
    def log(self) -> str:
        """Stream of accepted jobs."""
        return f"{self.prefix}log"

    @property
    def journal(self) -> str:
        """Stream of committed batches."""
        return f"{self.prefix}journal"

    @property
    def notes(self) -> str:
        """Stream of finished futures, for waiters."""
        return f"{self.prefix}notes"

    @property
    def cursor(self) -> str:
        """Entry id before the oldest open job."""
        return f"{self.prefix}cursor"

    @property
    def lease(self) -> str:
        """Owner of the running gang, with an expiry."""
        return f"{self.prefix}lease"

    @property
    def epoch(self) -> str:
        """The fencing number."""
        return f"{self.prefix}epoch"

    @property
    def card(self) -> str:
        """The engine's card, JSON."""
        return f"{self.prefix}card"

    @property
    def terms(self) -> str:
        """What gangs that are started by hand must have configured alike, JSON."""
        return f"{self.prefix}terms"

    @property
    def stat(self) -> str:
        """Hash of counters: log and notes (last ids), journal (last batch), queued_jobs, queued_bytes, ewma_ms, done_ms."""
        return f"{self.prefix}stat"

    @property
    def running(self) -> str:
        """Hash of the batch that the gang began last: epoch, batch, op, futures, since_ms. For people who look."""
        return f"{self.prefix}running"

    def future(self, future_id: FutureId) -> str:
        """Hash of one future."""
        return f"{self.prefix}future:{future_id}"

    def blob(self, future_id: FutureId, digest: str) -> str:
        """A payload beside the stream. The digest keeps a conflicting submission from touching an accepted one's."""
        return f"{self.prefix}blob:{future_id}:{digest}"

    def unnumbered_blob(self, owner: OwnerId, call: str, digest: str) -> str:
        """A payload beside the stream of a job that the server is about to number. call: a name of this very submission."""
        return f"{self.prefix}blob:{owner}:{call}:{digest}"

    def once(self, owner: OwnerId, call: str) -> str:
        """The seq that a submission got, for the same call sent twice by a connection that broke."""
        return f"{self.prefix}once:{owner}:{call}"

    def again(self, owner: OwnerId, retry_key: str, digest: str) -> str:
        """The seq that a client's request got, for the same request sent twice by the client."""
        return f"{self.prefix}again:{owner}:{retry_key}:{digest}"

    def record(self, kind: RecordKind, record_id: str) -> str:
        """Hash of one model, sampler, session or checkpoint."""
        return f"{self.prefix}{kind}:{record_id}"

    def done(self, sampler: SamplerId, block: int) -> str:
        """Stream of the finished samples of one client's block of seqs."""
        return f"{self.prefix}done:{sampler}:{block}"

    def link(self, token: str) -> str:
        """What a download's token stands for, with an expiry."""
        return f"{self.prefix}link:{token}"

    @property
    def gaps(self) -> str:
        """Sorted set of models with held jobs, by the arrival of the longest held."""
        return f"{self.prefix}gaps"

    def held(self, model: ModelId) -> str:
        """Sorted set of a model's held seqs, by arrival."""
        return f"{self.prefix}held:{model}"

    @property
    def tenants(self) -> str:
        """Hash of queued bytes by tenant."""
        return f"{self.prefix}tenants"

    @property
    def tenant_jobs(self) -> str:
        """Hash of queued jobs by tenant."""
        return f"{self.prefix}tenant_jobs"

    def tenant_list(self, kind: RecordKind, tenant: TenantId) -> str:
        """Sorted set of a tenant's records of a kind, by the time they were made."""
        return f"{self.prefix}list:{kind}:of:{tenant}"

    def child_list(self, kind: RecordKind, parent: str) -> str:
        """Sorted set of a session's models or samplers, or of a model's checkpoints."""
        return f"{self.prefix}list:{kind}:in:{parent}"


def next_seq_field(seq: int) -> str:
    """The field of a model's record that holds the next seq of seq's lane; lane_field of the Lua scripts."""
    lane = lane_of(seq)
    return f"next_seq:{lane}" if lane else "next_seq"


def record_fields(raw: dict[bytes, bytes]) -> dict[str, str] | None:
    """A record's hash as text, None when there is none. The mark that makes add_record idempotent is left out."""
    fields = {name.decode(): value.decode() for name, value in raw.items() if name != b"made_by"}
    return fields if raw else None
