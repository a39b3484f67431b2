"""A log, or a part of one, as a single file that can be carried away and made a log again."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from gradstream.engine.files import storage_errors, sync_directory
from gradstream.shared.clock import Clock
from gradstream.worker.disklog import framing
from gradstream.worker.disklog.errors import LogDamaged, NoExport
from gradstream.worker.disklog.frames import (
    FORMAT_VERSION,
    Frame,
    LoggedBatch,
    LoggedJob,
    Position,
    SegmentHead,
    Selection,
    SelectionEnd,
)
from gradstream.worker.disklog.framing import AnyFrame, BadFrame, StrangeFrame
from gradstream.worker.disklog.segments import SegmentFile, segment_name, segment_paths
from gradstream.worker.disklog.selection import Choice, Taken, selected, survey

_ADVICE = "Copy or export the file again"
_BUFFER_BYTES = 1024**2


class Log(Protocol):
    """What is exported: `DiskLog`, or `AroundDamage`, which leaves out what does not read."""

    @property
    def directory(self) -> Path: ...

    def scan(self) -> Iterator[tuple[Position, Frame]]:
        """The frames with their positions, oldest first."""
        ...


def export_log(log: Log, file: Path, choice: Choice, *, clock: Clock) -> SelectionEnd:
    """Write what choice takes from a log into one file, which appears whole or not at all; what was written.

    The file holds clients' data and is for its owner only (0600). Raises ValueError when nothing of the log is chosen, FileExistsError,
    LogDamaged, StorageFailure.
    """
    taken = survey((frame for _, frame in log.scan()), choice)
    head = next((frame for _, frame in log.scan() if isinstance(frame, SegmentHead)), None)
    if head is None or not (taken.jobs or taken.num_batches):
        raise ValueError(f"nothing in the job log in {log.directory} is of these models in this range")
    if file.exists():
        raise FileExistsError(file)
    with storage_errors(f"cannot write {file}"), _whole_file(file) as sink:
        end = _write(sink, log, _selection(head, choice, taken, clock), taken)
    if end.num_batches != taken.num_batches or end.num_jobs < len(taken.jobs):
        file.unlink()
        raise LogDamaged(log.directory, 0, "segments went while they were exported", advice="Export again")
    return end


def import_log(file: Path, directory: Path) -> Selection:
    """Make a directory that DiskLog reads from an exported file; it appears whole or not at all. What the file says that it holds.

    Raises FileExistsError when the directory holds a log, OSError when the file cannot be opened, LogDamaged, StorageFailure.
    """
    if segment_paths(directory):
        raise FileExistsError(directory)
    frames = archive_frames(file)
    selection = next(frames)
    assert isinstance(selection, Selection), "archive_frames yields it first"
    with storage_errors(f"cannot write {directory}"):
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        with storage_errors(f"cannot write {directory}"):
            _write_segments(draft, frames)
            draft.rename(directory)
            sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return selection


def archive_frames(file: Path) -> Iterator[AnyFrame]:
    """The frames of an exported file: its Selection, frames of the log, its SelectionEnd. Raises LogDamaged when it is not whole."""
    with file.open("rb", buffering=_BUFFER_BYTES) as source:
        size = os.fstat(source.fileno()).st_size
        offset, salt = 0, 0
        while offset < size:
            try:
                raw = framing.read(source, room=size - offset, salt=salt)
                frame = raw.decode()
            except (BadFrame, StrangeFrame) as error:
                if offset == 0:
                    raise NoExport(file) from error
                raise LogDamaged(file, offset, str(error), advice=_ADVICE) from error
            if offset == 0:
                salt = _checked(file, frame).salt
            offset += raw.num_bytes
            yield frame
            if isinstance(frame, SelectionEnd):
                return
    if offset == 0:
        raise NoExport(file)
    raise LogDamaged(file, offset, "it ends before its last frame", advice=_ADVICE)


def _checked(file: Path, frame: AnyFrame) -> Selection:
    if not isinstance(frame, Selection):
        raise NoExport(file)
    if frame.version > FORMAT_VERSION:
        reason = f"it has format {frame.version}, and this gradstream reads up to {FORMAT_VERSION}"
        raise LogDamaged(file, 0, reason, advice="Use a newer gradstream")
    return frame


def _selection(head: SegmentHead, choice: Choice, taken: Taken, clock: Clock) -> Selection:
    is_wider = choice.owners is not None and taken.owners != frozenset(choice.owners)
    return Selection(
        version=FORMAT_VERSION,
        engine=head.engine,
        fingerprint=head.fingerprint,
        created_ms=clock.wall_ms(),
        salt=secrets.randbits(32),
        owners=None if taken.owners is None else sorted(taken.owners),
        asked=sorted(choice.owners) if is_wider and choice.owners is not None else None,
        start=None if choice.start is None else str(choice.start),
        stop=None if choice.stop is None else str(choice.stop),
    )


def _write(sink: BinaryIO, log: Log, selection: Selection, taken: Taken) -> SelectionEnd:
    sink.write(framing.pack(selection, salt=0))
    num_jobs, num_batches, num_partial = 0, 0, 0
    for frame in selected((frame for _, frame in log.scan()), taken):
        sink.write(framing.pack(frame, salt=selection.salt))
        num_jobs += isinstance(frame, LoggedJob)
        if isinstance(frame, LoggedBatch):
            num_batches += 1
            num_partial += frame.partial
    end = SelectionEnd(num_jobs=num_jobs, num_batches=num_batches, num_partial=num_partial)
    sink.write(framing.pack(end, salt=selection.salt))
    return end


@contextmanager
def _whole_file(file: Path) -> Iterator[BinaryIO]:
    """A private file that gets its name when the block ends without an error."""
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES) as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        Path(name).rename(file)
        sync_directory(file.parent)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write_segments(directory: Path, frames: Iterator[AnyFrame]) -> None:
    """Segments as the frames' heads divide them, linked anew."""
    with ExitStack() as stack:
        segment: SegmentFile | None = None
        epoch, index, salt = 0, 0, 0
        for frame in frames:
            match frame:
                case SegmentHead():
                    index = index + 1 if segment is not None and frame.epoch == epoch else 0
                    epoch, salt = frame.epoch, secrets.randbits(32)
                    after = None if segment is None else segment.end
                    _finish(segment, stack)
                    head = msgspec.structs.replace(frame, index=index, salt=salt, after=after)
                    segment = SegmentFile.create(directory / segment_name(epoch, index), head)
                    stack.callback(segment.close)
                case Selection() | SelectionEnd():
                    continue
                case _:
                    assert segment is not None, "a head comes before the first frame"
                    segment.append(framing.pack(frame, salt=salt))
        _finish(segment, stack)


def _finish(segment: SegmentFile | None, stack: ExitStack) -> None:
    """Sync a segment that is complete; the stack closes it."""
    if segment is not None:
        segment.sync()
        stack.close()
