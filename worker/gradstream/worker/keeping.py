"""What is kept on disk of the past: cuts, and the log from the oldest of them on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from gradstream.engine.snapshot.cut import Cut
from gradstream.engine.snapshot.store import SnapshotStore
from gradstream.shared.clock import Clock
from gradstream.shared.errors import StorageFailure, Unavailable
from gradstream.shared.joblog.port import BatchId, Covered, Feed, Fenced
from gradstream.worker.commit import Committer
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.disklog.retention import retain
from gradstream.worker.disklog.writer import Sync
from gradstream.worker.fence import exit_fenced
from gradstream.worker.journal import Journal
from gradstream.worker.pace import Cadence
from gradstream.worker.recovery.compare import Mode
from gradstream.worker.recovery.past import position_of

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """How the log on disk and the snapshots are kept. joblog, snapshots: their directories."""

    engine: str
    joblog: Path
    snapshots: Path
    mode: Mode = "exact"
    tolerance: float = 1e-3
    cadence: Cadence = field(default_factory=Cadence)
    sync: Sync = "everysec"
    segment_bytes: int = 256 * 1024**2
    retention_bytes: int = 16 * 1024**3
    retention_s: float = 30 * 86400.0


@dataclass(slots=True, kw_only=True)
class Keeping:
    """Which cuts are kept, and what follows from it: the pointer, older cuts removed, the log on disk trimmed.

    cuts: oldest first. After the start only the thread that writes cuts calls it.
    """

    feed: Feed
    store: SnapshotStore
    committer: Committer
    journal: Journal
    epoch: int
    durability: Durability
    clock: Clock
    cuts: Sequence[Cut]

    @property
    def covered(self) -> Covered | None:
        """Up to where the oldest kept cut makes the log dispensable; None without one."""
        if len(self.cuts) < self.durability.cadence.num_kept:
            return None
        head = self.cuts[0].head
        return Covered(batch=BatchId(head.epoch, head.number), entry_id=head.cursor)

    def finish(self, cut: Cut) -> Covered | None:
        """Name a cut that is on disk as the newest, once its batch is committed. Ends the process when the epoch is over."""
        if cut.head.epoch == self.epoch and not self.committer.wait_recorded(cut.head.number):
            raise Unavailable(f"batch {cut.head.number} was not committed")
        # No power cut may leave a snapshot of a batch that the log has not.
        self.journal.sync()
        try:
            self.feed.name_snapshot(_facts(cut), epoch=self.epoch)
        except Fenced as error:
            exit_fenced(str(error))
        self.cuts = [*self.cuts, cut][-self.durability.cadence.num_kept :]
        self._trim()
        return self.covered

    def _trim(self) -> None:
        try:
            self.store.collect({kept.id for kept in self.cuts})
            retain(
                self.durability.joblog,
                before=position_of(self.cuts[0]),
                max_bytes=self.durability.retention_bytes,
                max_age_s=self.durability.retention_s,
                clock=self.clock,
            )
        except (StorageFailure, UnknownPosition) as error:
            # Nothing needs it to be gone.
            _log.warning("past_not_trimmed", reason=str(error))


def _facts(cut: Cut) -> dict[str, str]:
    """The cut as `redis-cli HGETALL` shows it."""
    return {
        "cut": cut.name,
        "batch": str(BatchId(*cut.id)),
        "models": str(len(cut.models)),
        "bytes": str(cut.size_bytes),
        "created_ms": str(cut.head.created_ms),
    }
