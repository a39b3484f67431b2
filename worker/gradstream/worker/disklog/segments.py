"""One file of the log: its name, its head, and how it is written."""

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradstream.engine.files import sync_directory
from gradstream.worker.disklog import framing
from gradstream.worker.disklog.errors import LogDamaged
from gradstream.worker.disklog.frames import FORMAT_VERSION, Position, SegmentHead
from gradstream.worker.disklog.framing import BadFrame, StrangeFrame

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_NAME = re.compile(r"(\d{8})-(\d{6})\.seg")

# What the data of a file needs to be found again; without it (macOS) the rest is synced too.
sync_data = getattr(os, "fdatasync", os.fsync)


def segment_name(epoch: int, index: int) -> str:
    """The file of an epoch's nth segment; names sort in the order of (epoch, index)."""
    return f"{epoch:08d}-{index:06d}.seg"


def epoch_of(name: str) -> int:
    """The epoch in a segment's name."""
    return int(name[:8])


def newest_epoch(directory: Path) -> int:
    """The highest epoch that wrote a segment here, be it one that counts or not; 0 when none did."""
    paths = segment_paths(directory)
    return epoch_of(paths[-1].name) if paths else 0


def segment_paths(directory: Path) -> list[Path]:
    """The segments in a directory, in the order of their names; none when there is no such directory."""
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A segment that is there. body_start: the offset behind its head."""

    path: Path
    head: SegmentHead
    body_start: int

    @property
    def name(self) -> str:
        return self.path.name


def read_segment(path: Path) -> Segment | None:
    """The segment in a file, None when a crash left it before its head was whole: then it holds nothing.

    Raises LogDamaged when the head does not read and more follows, or when it is of a newer format.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            raw = framing.read(file, room=size, salt=0)
            head = raw.decode()
        except BadFrame as error:
            if framing.looks_like_more(file, start=framing.PREFIX.size, end=size):
                raise LogDamaged(path, 0, f"its head does not read ({error})") from error
            return None
        except StrangeFrame as error:
            raise LogDamaged(path, 0, str(error)) from error
    if not isinstance(head, SegmentHead) or segment_name(head.epoch, head.index) != path.name:
        raise LogDamaged(path, 0, "its first frame is not the head that belongs to its name")
    if head.version > FORMAT_VERSION:
        raise LogDamaged(path, 0, f"it has format {head.version}, and this gradstream reads up to {FORMAT_VERSION}")
    return Segment(path=path, head=head, body_start=raw.num_bytes)


class SegmentFile:
    """A segment being written. Not thread-safe.

    An append that fails leaves the file as it was before, or, when not even that can be had, spoilt: nothing may follow then, and the
    next segment's head says where this one ends.
    """

    def __init__(self, path: Path, descriptor: int, end: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._end = end
        self._is_spoilt = False

    @classmethod
    def create(cls, path: Path, head: SegmentHead) -> "SegmentFile":
        """A new file with its head, on disk before this returns. Raises OSError and leaves no file, FileExistsError if there is one."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        segment = cls(path, descriptor, 0)
        try:
            segment.append(framing.pack(head, salt=0))
            os.fsync(descriptor)
            sync_directory(path.parent)
        except OSError:
            with suppress(OSError):
                path.unlink()
            segment.close()
            raise
        return segment

    @property
    def end(self) -> Position:
        """Where the next frame goes."""
        return Position(self._path.name, self._end)

    @property
    def is_spoilt(self) -> bool:
        return self._is_spoilt

    def append(self, data: bytes) -> None:
        """Write data at the end. Raises OSError; then nothing was written."""
        assert not self._is_spoilt, "a spoilt segment takes no more frames"
        rest, at = memoryview(data), self._end
        try:
            while rest:
                num_written = os.pwrite(self._descriptor, rest, at)
                rest, at = rest[num_written:], at + num_written
        except OSError:
            self._take_back()
            raise
        self._end = at

    def sync(self) -> None:
        """Return when what was appended is on disk. Raises OSError."""
        sync_data(self._descriptor)

    def duplicate(self) -> int:
        """A second descriptor, for a sync that does not keep appends waiting; the caller closes it."""
        return os.dup(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._end)
        except OSError:
            self._is_spoilt = True


def sync_file(path: Path) -> None:
    """Bring a file's data to disk, whoever wrote it. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
