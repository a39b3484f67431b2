"""Frames to bytes and back.

A frame is: u32 length of the body, u32 checksum, u8 flags, body; integers little-endian. The body is the msgpack of a frame type, as a
zstd frame when flag 1 is set; a job whose payload is a zstd frame already is not packed again. The checksum is zlib's crc32 of flags
and body, continued from the segment's salt (0 for the first frame of a file).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

import msgspec

from gradstream.shared import codec
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge
from gradstream.worker.disklog.frames import Frame, LoggedJob, PackedJob, Selection, SelectionEnd

PREFIX = struct.Struct("<IIB")
# Of a body, as stored and unpacked; a job's payload is far below it.
MAX_BODY_BYTES = 1024**3
_COMPRESS_ABOVE_BYTES = 1024
_ZSTD = 1

# How a frame goes on after length and checksum: flags, then a map that starts with its tag, or a zstd frame.
_LOOKS_LIKE_A_FRAME = re.compile(rb"\x00[\x80-\x8f]\xa4type|\x01\x28\xb5\x2f\xfd")
_BEFORE_FLAGS_BYTES = PREFIX.size - 1
_LOOK_BYTES = _BEFORE_FLAGS_BYTES + 6
_CHUNK_BYTES = 1024**2

AnyFrame = Frame | Selection | SelectionEnd
_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[AnyFrame | PackedJob] = msgspec.msgpack.Decoder(AnyFrame | PackedJob)


class BadFrame(Exception):
    """The bytes at this place are no frame: torn, or changed since they were written."""


class StrangeFrame(Exception):
    """The bytes are as they were written, but this version does not know what they mean."""


def pack(frame: AnyFrame | PackedJob, *, salt: int) -> bytes:
    """The bytes of a frame. Raises PayloadTooLarge for one over MAX_BODY_BYTES."""
    body, flags = _ENCODER.encode(frame), 0
    if len(body) > MAX_BODY_BYTES:
        raise PayloadTooLarge(f"a frame of {len(body)} bytes does not fit the job log, which takes {MAX_BODY_BYTES}")
    if len(body) > _COMPRESS_ABOVE_BYTES and not isinstance(frame, PackedJob):
        compressed = codec.compress(body)
        if len(compressed) < len(body):
            body, flags = compressed, _ZSTD
    return PREFIX.pack(len(body), _checksum(flags, body, salt), flags) + body


class Raw(NamedTuple):
    """A frame's flags and body as stored, with their checksum found right."""

    flags: int
    body: bytes

    @property
    def num_bytes(self) -> int:
        """Of the whole frame on disk."""
        return PREFIX.size + len(self.body)

    def decode(self) -> AnyFrame:
        """The frame. Raises StrangeFrame."""
        try:
            body = self.body
            if self.flags & _ZSTD:
                body = codec.decompress(body, max_bytes=MAX_BODY_BYTES, name="frame")
            frame = _DECODER.decode(body)
            return _unpacked(frame) if isinstance(frame, PackedJob) else frame
        except (msgspec.DecodeError, InvalidRequest, PayloadTooLarge) as error:
            raise StrangeFrame(f"a frame that this version of gradstream does not know ({error})") from error


def _unpacked(packed: PackedJob) -> LoggedJob:
    payload = codec.decompress(packed.payload, max_bytes=MAX_BODY_BYTES, name="payload")
    return msgspec.structs.replace(packed.logged, job=msgspec.structs.replace(packed.logged.job, payload=payload))


def read(file: BinaryIO, *, room: int, salt: int) -> Raw:
    """The frame at the file's place, which has room bytes at most. Nothing is read that does not fit. Raises BadFrame."""
    if room < PREFIX.size or len(prefix := file.read(PREFIX.size)) < PREFIX.size:
        raise BadFrame(f"{room} bytes are less than the shortest frame")
    length, checksum, flags = PREFIX.unpack(prefix)
    if not 0 < length <= min(room - PREFIX.size, MAX_BODY_BYTES):
        raise BadFrame(f"a frame of {length} bytes does not fit the {room} bytes that are there")
    body = file.read(length)
    if len(body) < length or _checksum(flags, body, salt) != checksum:
        raise BadFrame(f"the checksum of a frame of {length} bytes is wrong")
    return Raw(flags, body)


def find_frame(file: BinaryIO, *, start: int, end: int, salt: int) -> int | None:
    """Where the first frame with a right checksum lies at or behind start, as far as end; None when there is none."""
    for offset in _candidates(file, start=start, end=end):
        file.seek(offset)
        with suppress(BadFrame):
            read(file, room=end - offset, salt=salt)
            return offset
    return None


def looks_like_more(file: BinaryIO, *, start: int, end: int) -> bool:
    """True when something between start and end looks like a frame, whatever its checksum."""
    return next(iter(_candidates(file, start=start, end=end)), None) is not None


def _candidates(file: BinaryIO, *, start: int, end: int) -> Iterator[int]:
    """Offsets from start on where a frame may begin, by the look of its first bytes."""
    at = start
    while end - at >= PREFIX.size:
        file.seek(at)
        chunk = file.read(min(_CHUNK_BYTES, end - at))
        for found in _LOOKS_LIKE_A_FRAME.finditer(chunk, _BEFORE_FLAGS_BYTES):
            yield at + found.start() - _BEFORE_FLAGS_BYTES
        if len(chunk) <= _LOOK_BYTES:
            return
        # What starts in the last bytes of a chunk is seen whole in the next one.
        at += len(chunk) - _LOOK_BYTES


def _checksum(flags: int, body: bytes, salt: int) -> int:
    return zlib.crc32(body, zlib.crc32(bytes((flags,)), salt))
