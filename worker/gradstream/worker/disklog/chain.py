"""Which segments are the log, and where each of them ends."""

from collections.abc import Iterator, Sequence
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
    return list(_backwards(directory, segment_paths(directory)))[::-1]


def resolve_around(directory: Path) -> tuple[list[Link], list[LogDamaged]]:
    """The segments as far as heads can be read, oldest first, and what stands in the way of the others.

    Behind a gap the newest older segment is taken for the end of the log there, so that what a gang wrote after it had lost its lease
    may be among it.
    """
    paths = segment_paths(directory)
    links: list[Link] = []
    damages: list[LogDamaged] = []
    while paths:
        oldest_name = paths[-1].name
        try:
            for link in _backwards(directory, paths):
                links.append(link)
                oldest_name = link.segment.name
            break
        except LogDamaged as damage:
            damages.append(damage)
            # What is missing or does not read lies before the last good segment, or is the newest itself.
            limit = min(oldest_name, damage.path.name)
            paths = [path for path in paths if path.name < limit]
    return links[::-1], damages[::-1]


def _backwards(directory: Path, paths: Sequence[Path]) -> Iterator[Link]:
    """The segments of the log that ends with the newest of paths, newest first. Raises LogDamaged."""
    segment = _newest(paths)
    if segment is None:
        return
    yield Link(segment=segment, end=None)
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
        yield Link(segment=segment, end=after.offset)


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
