"""What of a log on disk is whole: every segment is walked, every checksum and digest computed again."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gradstream.shared import codec
from gradstream.shared.ids import FutureId
from gradstream.shared.joblog.port import BatchId
from gradstream.worker.disklog.archive import archive_frames
from gradstream.worker.disklog.chain import Link, resolve
from gradstream.worker.disklog.errors import LogDamaged, NoExport
from gradstream.worker.disklog.frames import LoggedBatch
from gradstream.worker.disklog.framing import AnyFrame
from gradstream.worker.disklog.log import segment_frames
from gradstream.worker.disklog.segments import read_segment, segment_paths


class SegmentState(StrEnum):
    """whole: it reads to its end. torn: more bytes stand behind its last frame that counts. void: a gang that had lost its lease wrote
    it. empty: a crash left it before its head was whole. damaged: it does not read."""

    WHOLE = "whole"
    TORN = "torn"
    VOID = "void"
    EMPTY = "empty"
    DAMAGED = "damaged"


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentReport:
    """One segment. frames: how many of each kind count. good_bytes: what these take, of size_bytes."""

    name: str
    state: SegmentState
    size_bytes: int
    good_bytes: int
    frames: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A whole log. problems: in words, with file and offset; none when the log is sound. first and last: its batches."""

    segments: Sequence[SegmentReport]
    problems: Sequence[str]
    first: BatchId | None
    last: BatchId | None
    num_outcomes: int

    @property
    def is_sound(self) -> bool:
        return not self.problems


@dataclass(slots=True)
class _Findings:
    problems: list[str] = field(default_factory=list)
    first: BatchId | None = None
    last: BatchId | None = None
    ended: set[FutureId] = field(default_factory=set)

    def take(self, frame: AnyFrame) -> None:
        """Check a batch: its place in the order, its digests, and that it ends no job a second time."""
        if not isinstance(frame, LoggedBatch):
            return
        if self.last is not None and frame.batch_id <= self.last:
            self.problems.append(f"batch {frame.batch_id} stands behind batch {self.last}")
        self.first = self.first or frame.batch_id
        self.last = frame.batch_id
        for outcome in frame.outcomes:
            if codec.digest(outcome.data) != outcome.digest:
                self.problems.append(
                    f"batch {frame.batch_id}: the outcome of {outcome.future_id} does not have its digest"
                )
            if outcome.future_id in self.ended:
                self.problems.append(f"batch {frame.batch_id}: {outcome.future_id} had an outcome before")
            self.ended.add(outcome.future_id)

    def report(self, segments: Sequence[SegmentReport]) -> Report:
        return Report(
            segments=segments,
            problems=tuple(self.problems),
            first=self.first,
            last=self.last,
            num_outcomes=len(self.ended),
        )


def verify(directory: Path) -> Report:
    """Walk a whole log; damage is reported, not raised, and what follows it is walked too."""
    findings = _Findings()
    links: dict[str, Link] | None = None
    try:
        links = {link.segment.name: link for link in resolve(directory)}
    except LogDamaged as error:
        findings.problems.append(_words(error))
    segments = []
    for path in segment_paths(directory):
        try:
            segments.append(_segment(path, links, findings))
        except LogDamaged as error:
            _add(findings, error)
            segments.append(_report(path, SegmentState.DAMAGED))
    return findings.report(segments)


def verify_archive(file: Path) -> Report:
    """Walk an exported file. Raises NoExport, OSError."""
    findings = _Findings()
    try:
        for frame in archive_frames(file):
            findings.take(frame)
    except NoExport:
        raise
    except LogDamaged as error:
        _add(findings, error)
    return findings.report([])


def _segment(path: Path, links: Mapping[str, Link] | None, findings: _Findings) -> SegmentReport:
    """The report of one segment. links: those that count, None when that cannot be told. Raises LogDamaged for its head."""
    if links is not None and path.name in links:
        return _walk(path, links[path.name], findings)
    segment = read_segment(path)
    if segment is None:
        return _report(path, SegmentState.EMPTY)
    if links is not None:
        return _report(path, SegmentState.VOID)
    return _walk(path, Link(segment=segment, end=None), findings)


def _walk(path: Path, link: Link, findings: _Findings) -> SegmentReport:
    counts: Counter[str] = Counter()
    end = 0
    try:
        for step in segment_frames(link, 0):
            counts[str(step.frame.__struct_config__.tag)] += 1
            end = step.end.offset
            findings.take(step.frame)
    except LogDamaged as error:
        _add(findings, error)
        return _report(path, SegmentState.DAMAGED, good_bytes=end, frames=counts)
    state = SegmentState.WHOLE if end == path.stat().st_size else SegmentState.TORN
    return _report(path, state, good_bytes=end, frames=counts)


def _report(
    path: Path, state: SegmentState, *, good_bytes: int = 0, frames: Mapping[str, int] | Iterable[tuple[str, int]] = ()
) -> SegmentReport:
    size_bytes = path.stat().st_size
    return SegmentReport(name=path.name, state=state, size_bytes=size_bytes, good_bytes=good_bytes, frames=dict(frames))


def _add(findings: _Findings, error: LogDamaged) -> None:
    if (words := _words(error)) not in findings.problems:
        findings.problems.append(words)


def _words(error: LogDamaged) -> str:
    return f"{error.path.name} at byte {error.offset}: {error.reason}"
