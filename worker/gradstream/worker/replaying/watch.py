"""What a user wants to see of single batches of a replay: the debugger before one, the tensors around one."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.shared.wire import Batch, Outcome
from gradstream.worker.leader import REFUSED
from gradstream.worker.recovery.replay import PastBatch
from gradstream.worker.replaying.debugger import run_in_debugger
from gradstream.worker.replaying.dump import Dump
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.runner import Run
from gradstream.worker.replaying.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """break_at: a job or batch. dump: a new directory; dump_at: of which job or batch, None for the last. json: stdout is for JSON."""

    break_at: str | None = None
    dump: Path | None = None
    dump_at: str | None = None
    json: bool = False


class Watch:
    """Runs the batches of a session, and the wished ones with what was wished."""

    def __init__(self, session: Session, wishes: Wishes) -> None:
        self._session = session
        self._wishes = wishes
        self._break: BatchId | None = None
        self._dump: Dump | None = None
        self._dump_batch: BatchId | None = None

    def open(self) -> None:
        """Find the batches, and make the directory. Raises CannotReplay when one is not run, StorageFailure."""
        wishes, session = self._wishes, self._session
        if wishes.break_at is not None:
            self._break = self._find("--break-at", wishes.break_at)
        if wishes.dump is not None:
            at = wishes.dump_at or session.want.to or str(session.extent.notes[-1].batch)
            self._dump_batch = self._find("--dump", at)
            self._dump = Dump(wishes.dump, session.engine, fingerprint=session.fingerprint)
            self._dump.open()
        session.runner.watch = self

    def __call__(self, past: PastBatch, batch: Batch, run: Run) -> Mapping[FutureId, Outcome]:
        """Run one batch."""
        dump = self._dump if past.batch == self._dump_batch else None
        if dump is not None:
            dump.models(past, "before")
        if past.batch == self._break:
            at = FutureId(self._wishes.break_at or "")
            outcomes = run_in_debugger(self._session.engine, past, batch, run, at=at, quiet_stdout=self._wishes.json)
        else:
            outcomes = run(batch)
        if dump is not None:
            dump.models(past, "after")
            dump.finish(past, outcomes)
        return outcomes

    def _find(self, option: str, text: str) -> BatchId:
        batch = self._session.seen.batches[self._session.seen.find(text)].batch
        notes = [note for note in self._session.extent.notes if note.batch == batch]
        if not notes or notes[0].kind == REFUSED:
            raise CannotReplay(
                f"{option}: batch {batch} of {text} is not run again: it had been answered without the engine, "
                "is of another model than --model, or needs --samples"
            )
        return batch
