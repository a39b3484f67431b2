"""What of a log is run: up to where, for whom, and from which of its snapshots."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradstream.engine.snapshot.cut import Cut
from gradstream.shared.ids import future_parts
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.inspect.log_source import batch_id
from gradstream.worker.leader import REFUSED
from gradstream.worker.recovery.past import position_of
from gradstream.worker.replaying.errors import CannotReplay
from gradstream.worker.replaying.fingerprints import differences
from gradstream.worker.replaying.overview import SAMPLE, Note, Overview, is_run
from gradstream.worker.replaying.source import Source

START, SNAPSHOT, EARLIEST = "start", "snapshot", "earliest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What to run. to: a job or a batch, None for the end of the log. model None: all models.

    begin: "start", "snapshot" (the newest that serves), "earliest" (the start, else the oldest snapshot that serves), a batch with a
    snapshot, or None for the newest snapshot, else the start. also: jobs or batches that must be run too. tolerance: None compares
    every byte. samples: they are run and compared.
    """

    to: str | None = None
    model: str | None = None
    begin: str | None = None
    also: Sequence[str] = ()
    tolerance: float | None = None
    samples: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What of a log is run: the batches behind a cut (None: from the start) up to last, of these owners (None: of all)."""

    cut: Cut | None
    notes: Sequence[Note]
    last: BatchId
    owners: frozenset[str] | None
    samples: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Places in the overview: first must be run, stop is behind the last one."""

    first: int
    stop: int


def bounds_of(seen: Overview, want: Want) -> Bounds:
    """Where the replay ends, and the first batch that must be part of it. Raises CannotReplay."""
    also = [seen.find(text) for text in want.also]
    to = len(seen.batches) - 1 if want.to is None else seen.find(want.to)
    if beyond := [text for text, place in zip(want.also, also, strict=True) if place > to]:
        raise CannotReplay(f"{beyond[0]}: comes after {want.to}, where the replay ends")
    runs = [
        place
        for place, note in enumerate(seen.batches[: to + 1])
        if is_run(note, samples=want.samples) and (want.model is None or want.model in note.owners)
    ]
    if not runs:
        raise CannotReplay(_nothing(seen, want))
    last = runs[-1] if want.to is None else to
    return Bounds(first=min([runs[-1], last, *also]), stop=last + 1)


def _nothing(seen: Overview, want: Want) -> str:
    if seen.damage is not None:
        return seen.damage.message
    who = "no model" if want.model is None else f"nothing of {want.model}"
    return f"{who} trains in this log{'' if want.to is None else f' up to {want.to}'}"


def cuts_for(source: Source, seen: Overview, want: Want, bounds: Bounds) -> Iterator[Cut | None]:
    """Where to begin, the best place first; None is the start of the log."""
    if want.begin in (START, EARLIEST):
        yield None
    if want.begin == START:
        return
    named = None if want.begin in (None, SNAPSHOT, EARLIEST) else batch_id(want.begin)
    if want.begin not in (None, SNAPSHOT, EARLIEST) and named is None:
        raise CannotReplay(f"--from: {want.begin!r} is neither start nor snapshot nor a batch such as 3-17")
    if want.begin not in (None, EARLIEST) and source.snapshots is None:
        raise CannotReplay("--from: an exported log has no snapshots; use --from start")
    before = seen.batches[bounds.first].batch
    known = {note.batch for note in seen.batches}
    if source.snapshots is not None:
        found = source.snapshots.cuts()
        for cut in reversed(found) if want.begin == EARLIEST else found:
            here = BatchId(*cut.id)
            if here < before and here in known and (named is None or here == named) and _is_on(source, cut):
                yield cut
    if named is not None:
        raise CannotReplay(
            f"--from: no snapshot after batch {named} lies on this log before {before}; `gradstream snapshots` lists them"
        )
    if want.begin is None:
        yield None


def _is_on(source: Source, cut: Cut) -> bool:
    """True when the log goes on from the cut."""
    try:
        return next(source.log.scan(position_of(cut)), None) is not None
    except UnknownPosition:
        return False


def extent_from(seen: Overview, want: Want, bounds: Bounds, cut: Cut | None) -> Extent:
    """What is run when the replay begins at cut. Raises CannotReplay when the model has no job there."""
    notes = [
        note
        for note in seen.batches[: bounds.stop]
        if (cut is None or note.batch > BatchId(*cut.id)) and is_run(note, samples=want.samples)
    ]
    owners = None if want.model is None else seen.needed(want.model, notes)
    if owners is not None:
        notes = [note for note in notes if note.kind == SAMPLE or note.owners & owners or _is_failed_of(note, owners)]
    return Extent(cut=cut, notes=notes, last=seen.batches[bounds.stop - 1].batch, owners=owners, samples=want.samples)


def _is_failed_of(note: Note, owners: frozenset[str]) -> bool:
    """True for a batch in which nothing was done and a job of one of the owners failed."""
    return not note.owners and any(future_parts(future).owner in owners for future in note.futures)


def problem_of(extent: Extent) -> str | None:
    """Why the extent cannot be run: it begins after a model was made, or an export left out jobs; None when it can be."""
    alive = set() if extent.cut is None else {str(model) for model in extent.cut.models}
    for note in extent.notes:
        if note.kind in (SAMPLE, REFUSED):
            continue
        alive |= note.makes
        if missing := sorted(note.owners - alive):
            where = "the log" if extent.cut is None else "this snapshot"
            return (
                f"{where} begins too late: {missing[0]} trains in batch {note.batch} and was made before. Begin at a snapshot, "
                "export the log from its start, or name another model with --model"
            )
    return None


def unlike(seen: Overview, extent: Extent, here: str) -> list[str]:
    """In what the engine of fingerprint here, or what is left of the log, is not as it was; each as a sentence."""
    told = [
        f"the log was written by another kind of engine, and bits may differ: {'; '.join(found)}"
        for text in dict.fromkeys(seen.fingerprint(note) for note in extent.notes)
        if (found := differences(text, here))
    ]
    if partial := [note for note in extent.notes if note.is_partial]:
        told.append(
            f"{len(partial)} batches, first {partial[0].batch}, lack jobs that an export left out, and bits depend on them "
            "(`gradstream log export --with-neighbours` takes them along)"
        )
    return told
