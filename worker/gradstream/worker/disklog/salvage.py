"""The log read around damage: for people who look into it, never for a gang, which must have all of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gradstream.worker.disklog import framing
from gradstream.worker.disklog.chain import Link, resolve_around
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.frames import Frame, Position
from gradstream.worker.disklog.log import segment_frames

_MAX_NAMED = 3


class AroundDamage:
    """Reads the log in a directory as `DiskLog` does, stepping over what does not read.

    damages: what was stepped over so far, each place once. Behind a damaged place the log goes on with the next
    whole frame; a segment whose head does not read is left out.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.damages: list[LogDamaged] = []

    @property
    def directory(self) -> Path:
        return self._directory

    def scan(self) -> Iterator[tuple[Position, Frame]]:
        """The frames that read, oldest first, with their positions."""
        links, damages = resolve_around(self._directory)
        self._note(damages)
        for link in links:
            yield from self._segment(link)

    def skipped(self) -> str | None:
        """What was stepped over, in one line; None when nothing was."""
        if not self.damages:
            return None
        places = [
            f"{damage.path.name} at byte {damage.offset} ({damage.reason})" for damage in self.damages[:_MAX_NAMED]
        ]
        more = len(self.damages) - len(places)
        rest = f", and {more} more" if more else ""
        return f"skipped what does not read: {', '.join(places)}{rest}; jobs that ended there are shown as open"

    def _segment(self, link: Link) -> Iterator[tuple[Position, Frame]]:
        size = link.segment.path.stat().st_size
        if link.end is not None and size < link.end:
            self._note([LogDamaged(link.segment.path, size, f"the file ends here, not at byte {link.end}")])
            link = replace(link, end=None)
        offset: int | None = 0
        while offset is not None:
            try:
                for placed in segment_frames(link, offset):
                    yield placed.position, placed.frame
                offset = None
            except LogDamaged as damage:
                self._note([damage])
                offset = _next_frame(link, damage.offset)

    def _note(self, damages: list[LogDamaged]) -> None:
        known = {(damage.path, damage.offset) for damage in self.damages}
        self.damages += [damage for damage in damages if (damage.path, damage.offset) not in known]


def _next_frame(link: Link, offset: int) -> int | None:
    """Where the first whole frame behind offset lies, None when there is none in this segment."""
    path = link.segment.path
    end = path.stat().st_size if link.end is None else link.end
    with path.open("rb") as file:
        return framing.find_frame(file, start=offset + 1, end=end, salt=link.segment.head.salt)
