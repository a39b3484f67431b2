"""Segments that nothing needs any more leave the disk, oldest first."""

from collections.abc import Sequence
from pathlib import Path

import structlog

from gradstream.engine.files import storage_errors, sync_directory
from gradstream.shared.clock import Clock
from gradstream.worker.disklog.errors import UnknownPosition
from gradstream.worker.disklog.frames import Position
from gradstream.worker.disklog.segments import read_segment, segment_paths

_log = structlog.get_logger(__name__)


def retain(directory: Path, *, before: Position, max_bytes: int, max_age_s: float, clock: Clock) -> list[str]:
    """Remove segments that end before a position, while all are more than max_bytes or the oldest ended max_age_s ago; their names.

    before: where the scan for the oldest kept snapshot begins; its segment and all newer ones stay whatever they take. What is left
    is a log that starts later. A crash in between leaves one too. Raises UnknownPosition when there is no such segment.
    """
    paths = segment_paths(directory)
    names = [path.name for path in paths]
    if before.segment not in names:
        raise UnknownPosition(f"{before.segment} is not there: nothing in {directory} is known to be needless")
    sizes = {path: path.stat().st_size for path in paths}
    total_bytes = sum(sizes.values())
    ended_before_ms = clock.wall_ms() - 1000 * max_age_s
    removed: list[str] = []
    for index, path in enumerate(paths[: names.index(before.segment)]):
        if total_bytes <= max_bytes and _ended_ms(paths[index + 1 :]) >= ended_before_ms:
            break
        with storage_errors(f"cannot remove {path}"):
            path.unlink()
            # One by one, so that not even a power cut leaves a hole instead of a later start.
            sync_directory(directory)
        total_bytes -= sizes[path]
        removed.append(path.name)
    if removed:
        _log.info("disk_log_retained", num_removed=len(removed), last_removed=removed[-1], left_bytes=total_bytes)
    return removed


def _ended_ms(newer: Sequence[Path]) -> float:
    """When a segment ended: when the next one that has a head began."""
    heads = (read_segment(path) for path in newer)
    return next((segment.head.created_ms for segment in heads if segment is not None), float("inf"))
