"""The batches of a log in short, from one scan: where a job is, who shared a batch with whom, what was saved and loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId, FutureStatus
from gradstream.shared.wire import LoadWeightsDone, Outcome
from gradstream.worker.disklog.chain import resolve
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.frames import Dropped, Frame, LoggedBatch, LoggedJob
from gradstream.worker.disklog.log import DiskLog
from gradstream.worker.disklog.selection import owner_of
from gradstream.worker.inspect.log_source import batch_id
from gradstream.worker.leader import REFUSED
from gradstream.worker.records import is_creator, saved_uri
from gradstream.worker.recovery.replay import STATEFUL
from gradstream.worker.replaying.errors import CannotReplay

FORWARD = "forward"
SAMPLE = "sample"
SAVES = frozenset({"save_weights", "save_weights_for_sampler", "save_weights_external"})
# Plans with few jobs, whose outcomes say where a checkpoint went or came from.
TOUCH_FILES = SAVES | {"load_weights", REFUSED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One batch. owners: of jobs that were done, makes: those that were made. loads, saves: URIs that were read or written.

    is_partial: an export left out jobs of it.
    """

    batch: BatchId
    kind: str
    owners: frozenset[str]
    futures: tuple[FutureId, ...]
    makes: frozenset[str] = frozenset()
    loads: frozenset[str] = frozenset()
    saves: frozenset[str] = frozenset()
    is_partial: bool = False

    @property
    def is_shared(self) -> bool:
        """True when one model's bits may depend on another's jobs."""
        return self.kind != SAMPLE and len(self.owners) > 1


@dataclass(slots=True, kw_only=True)
class Overview:
    """A log. batches: in order. place: of each job that ended, the number of its batch in batches. open: jobs without an outcome.

    creators: jobs that make their model, with the base model that they name. base_models: under which names models were made. fingerprints:
    by epoch. damage: what keeps the rest from being read.
    """

    batches: list[Note] = field(default_factory=list)
    place: dict[FutureId, int] = field(default_factory=dict)
    open: set[FutureId] = field(default_factory=set)
    creators: dict[FutureId, str | None] = field(default_factory=dict)
    base_models: list[str] = field(default_factory=list)
    fingerprints: dict[int, str] = field(default_factory=dict)
    damage: LogDamaged | None = None

    def find(self, text: str) -> int:
        """The place of the batch that text names, itself (3-17) or by a job of it. Raises CannotReplay."""
        if (batch := batch_id(text)) is not None:
            places = [number for number, note in enumerate(self.batches) if note.batch == batch]
            place = places[0] if places else None
        else:
            place = self.place.get(FutureId(text))
        if place is not None:
            return place
        if text in self.open:
            raise CannotReplay(f"{text}: has no outcome in this log; only what ran can be run again")
        if self.damage is not None:
            raise CannotReplay(f"{text}: is not in the part of the log that can be read. {self.damage.message}")
        raise CannotReplay(f"{text}: is not in this log; `gradstream log list` shows what is")

    def fingerprint(self, note: Note) -> str:
        """Of the engine that ran a batch; empty when the log does not say."""
        return self.fingerprints.get(note.batch.epoch, "")

    def needed(self, model: str, notes: Sequence[Note]) -> frozenset[str]:
        """The model, everyone whose jobs ran in one batch with its own, who saved what it loaded, and so on for these.

        Raises CannotReplay when no job of the model is among notes.
        """
        if not any(model in note.owners for note in notes):
            raise CannotReplay(f"--model: no job of {model} was done in this part of the log")
        saver = {uri: owner for note in notes for uri in note.saves for owner in note.owners}
        groups = [
            note.owners | {saver[uri] for uri in note.loads if uri in saver}
            for note in notes
            if note.is_shared or note.loads
        ]
        return closed(frozenset({model}), groups)


def closed(owners: frozenset[str], groups: Iterable[frozenset[str]]) -> frozenset[str]:
    """The owners and everybody who is linked to them by groups."""
    links = set(groups)
    while (wider := owners.union(*(group for group in links if group & owners))) != owners:
        owners = wider
    return owners


def overview(log: DiskLog) -> Overview:
    """Scan a log, as far as it can be read. Raises LogDamaged when that is nowhere."""
    found = Overview()
    for link in resolve(log.directory):
        found.fingerprints[link.segment.head.epoch] = link.segment.head.fingerprint
    try:
        for _, frame in log.scan():
            _take_in(found, frame)
    except LogDamaged as error:
        found.damage = error
    return found


def _take_in(found: Overview, frame: Frame) -> None:
    match frame:
        case LoggedJob():
            found.open.add(frame.job.future_id)
            if is_creator(frame.job):
                found.creators[frame.job.future_id] = _base_model(frame)
        case Dropped():
            found.open.difference_update(frame.future_ids)
        case LoggedBatch():
            note = _note(frame, found)
            found.place.update(dict.fromkeys(note.futures, len(found.batches)))
            found.batches.append(note)
            _learn_bases(found, frame, note)
            found.open.difference_update(note.futures)
        case _:
            pass


def _base_model(frame: LoggedJob) -> str | None:
    """The base model that a job names; None when it names none, or does not read."""
    try:
        base = getattr(codec.decode_payload(frame.job.payload), "base_model", None)
    except InvalidRequest:
        return None
    return base if isinstance(base, str) else None


def _learn_bases(found: Overview, frame: LoggedBatch, note: Note) -> None:
    """The names of the base model under which this batch made models, as their jobs or their records say."""
    named = [found.creators.get(outcome.future_id) for outcome in frame.outcomes if note.makes]
    named += [(record.fields or {}).get("base_model") for record in [*frame.records, *frame.context] if note.makes]
    for base in named:
        if base and base not in found.base_models:
            found.base_models.append(base)


def _note(frame: LoggedBatch, found: Overview) -> Note:
    futures = tuple(outcome.future_id for outcome in frame.outcomes)
    done = [outcome for outcome in frame.outcomes if outcome.status is FutureStatus.DONE]
    told: list[Outcome] = []
    if frame.plan.kind in TOUCH_FILES:
        told = [codec.decode_outcome(outcome.data) for outcome in done]
    return Note(
        batch=frame.batch_id,
        kind=frame.plan.kind,
        owners=frozenset(owner_of(outcome.future_id) for outcome in done),
        futures=futures,
        makes=frozenset(owner_of(outcome.future_id) for outcome in done if outcome.future_id in found.creators),
        loads=frozenset(uri for outcome in told if (uri := loaded_uri(outcome)) is not None),
        saves=frozenset(uri for outcome in told if (uri := saved_uri(outcome)) is not None),
        is_partial=frame.partial
        or not found.open.issuperset(futures)
        or not set(futures).issuperset(frame.plan.future_ids),
    )


def loaded_uri(outcome: Outcome) -> str | None:
    """The checkpoint that a job read, None for every other outcome."""
    match outcome:
        case LoadWeightsDone(path=path):
            return path
        case _:
            return None


def is_run(note: Note, *, samples: bool) -> bool:
    """True for what a replay runs: what changes models, what reads them, and samples when they are asked for."""
    return note.kind in STATEFUL | SAVES | {FORWARD} or (samples and note.kind == SAMPLE) or note.kind == REFUSED
