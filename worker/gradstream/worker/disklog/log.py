"""The log as it is read: frames in order over all epochs."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gradstream.worker.disklog import framing
from gradstream.worker.disklog.chain import Link, resolve
from gradstream.worker.disklog.errors import LogDamaged, UnknownPosition
from gradstream.worker.disklog.frames import Frame, Position, Selection, SelectionEnd
from gradstream.worker.disklog.framing import BadFrame, Raw, StrangeFrame
from gradstream.worker.disklog.segments import epoch_of, segment_paths
from gradstream.worker.disklog.tail import Tail, TailBuilder

_BUFFER_BYTES = 1024**2


class PlacedFrame(NamedTuple):
    """A frame, where it starts and where it ends."""

    position: Position
    frame: Frame
    end: Position


class DiskLog:
    """Reads the log in a directory; never writes. It may be appended to meanwhile: reading ends at the last whole frame."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        return self._directory

    def scan(self, start: Position | None = None) -> Iterator[tuple[Position, Frame]]:
        """The log's frames with their positions, oldest first, from the frame at start or from the beginning.

        A frame torn by a kill, and nothing behind it, is the end. Raises LogDamaged when what was written does not read any more,
        UnknownPosition when start is not on the log.
        """
        for placed in self._walk(start):
            yield placed.position, placed.frame

    def tail(self, start: Position | None = None) -> Tail:
        """What a successor needs to know, from one scan. With start, as far as the frames from there on tell. Raises like scan."""
        builder = TailBuilder()
        end = start
        for placed in self._walk(start):
            builder.take(placed.position, placed.frame)
            end = placed.end
        paths = segment_paths(self._directory)
        return builder.build(end=end, epoch=epoch_of(paths[-1].name) if paths else 0)

    def _walk(self, start: Position | None) -> Iterator[PlacedFrame]:
        links = resolve(self._directory)
        offset = 0
        if start is not None:
            names = [link.segment.name for link in links]
            if start.segment not in names:
                raise UnknownPosition(f"{start.segment} is not part of the job log in {self._directory}")
            links = links[names.index(start.segment) :]
            offset = start.offset
        for link in links:
            yield from segment_frames(link, offset)
            offset = 0


def segment_frames(link: Link, offset: int) -> Iterator[PlacedFrame]:
    """The frames of one segment from an offset on. Raises LogDamaged, UnknownPosition when offset is behind the end."""
    segment = link.segment
    with segment.path.open("rb", buffering=_BUFFER_BYTES) as file:
        end = _limit(file, link)
        if offset > end:
            raise UnknownPosition(f"{segment.path} ends at byte {end}, before {offset}")
        file.seek(offset)
        while (raw := _next(file, link, offset)) is not None:
            position = Position(segment.name, offset)
            offset += raw.num_bytes
            yield PlacedFrame(position, _decoded(raw, segment.path, position.offset), Position(segment.name, offset))


def _limit(file: BinaryIO, link: Link) -> int:
    """How far the segment may be read. Raises LogDamaged when it has become shorter."""
    size = os.fstat(file.fileno()).st_size
    if link.end is None:
        return size
    if size < link.end:
        raise LogDamaged(link.segment.path, size, f"the file ends here, and the log in it ends at byte {link.end}")
    return link.end


def _next(file: BinaryIO, link: Link, offset: int) -> Raw | None:
    """The frame at offset, where the file stands, None at the end of the log in this segment. Raises LogDamaged."""
    salt = 0 if offset == 0 else link.segment.head.salt
    limit = _limit(file, link)
    while offset < limit:
        try:
            return framing.read(file, room=limit - offset, salt=salt)
        except BadFrame as error:
            if link.end is not None:
                raise LogDamaged(link.segment.path, offset, str(error)) from error
            grown = _limit(file, link)
            if grown <= limit:
                _check_torn(file, link, offset, error)
                return None
            # It was being written just now.
            limit = grown
            file.seek(offset)
    return None


def _check_torn(file: BinaryIO, link: Link, offset: int, error: BadFrame) -> None:
    """Raise LogDamaged when whole frames follow the bad one at offset: then a kill did not tear it."""
    end = _limit(file, link)
    found = framing.find_frame(file, start=offset + 1, end=end, salt=link.segment.head.salt)
    if found is not None:
        raise LogDamaged(link.segment.path, offset, f"{error}, and whole frames follow at byte {found}") from error


def _decoded(raw: Raw, path: Path, offset: int) -> Frame:
    try:
        frame = raw.decode()
    except StrangeFrame as error:
        raise LogDamaged(path, offset, str(error)) from error
    if isinstance(frame, Selection | SelectionEnd):
        raise LogDamaged(path, offset, "a frame of an exported file stands in the middle of the log")
    return frame
