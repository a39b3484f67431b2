"""Which segments are the log, and where each of them ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.segments import Segment, read_segment, segment_paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A segment that counts, as far as end; None for the newest one, which ends where its last whole frame does."""

    segment: Segment
    end: int | None


def resolve(directory: Path) -> list[Link]:
    """The segments of the log, oldest first.

    Found backwards from the newest segment: every head says where the log before it ends. What no head names does not count: a gang
    that had lost its lease wrote it. Segments at the old end may be gone (retention); one missing in the middle raises LogDamaged.
    """
    paths = segment_paths(directory)
    segment = _newest(paths)
    if segment is None:
        return []
    links = [Link(segment=segment, end=None)]
    while (after := segment.head.after) is not None:
        older = [path for path in paths if path.name <= after.segment]
        if not older:
            break
        if after.segment >= segment.name:
            raise LogDamaged(segment.path, 0, f"its head says that it follows {after.segment}")
        if older[-1].name != after.segment:
            raise LogDamaged(
                directory / after.segment, 0, f"this segment is missing, and {segment.name} goes on from it"
            )
        segment = _needed(older[-1])
        if after.offset < segment.body_start:
            raise LogDamaged(segment.path, after.offset, "the next segment says that this one ends within its head")
        links.append(Link(segment=segment, end=after.offset))
    return links[::-1]


def _newest(paths: Sequence[Path]) -> Segment | None:
    for path in reversed(paths):
        if (segment := read_segment(path)) is not None:
            return segment
    return None


def _needed(path: Path) -> Segment:
    segment = read_segment(path)
    if segment is None:
        raise LogDamaged(path, 0, "its head is gone")
    return segment
