"""Bytes to wire types and back; the only place that knows msgpack and zstd framing."""

import hashlib
from typing import TypeVar

import msgspec
import zstandard

from gradstream.shared.errors import InvalidRequest, PayloadTooLarge
from gradstream.shared.wire import Outcome, Payload, Plan

T = TypeVar("T")

_ENCODER = msgspec.msgpack.Encoder()
_PAYLOAD: msgspec.msgpack.Decoder[Payload] = msgspec.msgpack.Decoder(Payload)
_OUTCOME: msgspec.msgpack.Decoder[Outcome] = msgspec.msgpack.Decoder(Outcome)

# Level 1 is the knee on token ids. Below this size the frame is not worth the CPU.
COMPRESS_ABOVE_BYTES = 8 * 1024
_LEVEL = 1
# How fast what does not repeat is passed over: less than half the time on random floats, for a tenth more bytes.
_ACCELERATION = 3
# Targets are the tokens once more, shifted by one, in another column: where the window reaches that far back, they cost next to nothing.
_MIN_WINDOW_LOG, _MAX_WINDOW_LOG = 10, 27
# Of the table in which repetitions are found; with a small one those of a very large payload are not.
_HASH_LOG, _LARGE_HASH_LOG = 14, 17
_LARGE_BYTES = 8 * 1024 * 1024
_MAX_WINDOW_BYTES = 1 << _MAX_WINDOW_LOG
# One zstd block of 4 bytes can stand for 128 KiB; input is fed in steps that cannot overshoot the cap by more than itself.
_MAX_EXPANSION = 32 * 1024


def encode(value: Payload | Outcome | Plan) -> bytes:
    """msgpack bytes of a wire value."""
    return _ENCODER.encode(value)


def decode_payload(data: bytes) -> Payload:
    """The payload in data; raises InvalidRequest when data is no payload of this version."""
    return _decode(_PAYLOAD, data, "payload")


def decode_outcome(data: bytes) -> Outcome:
    """The outcome in data; raises InvalidRequest when data is no outcome."""
    return _decode(_OUTCOME, data, "outcome")


def op_of(payload: Payload) -> str:
    """The op name of a payload: its msgpack tag, and `forward` for a forward_backward without gradients."""
    tag = payload.__struct_config__.tag
    assert isinstance(tag, str)
    return "forward" if tag == "forward_backward" and not getattr(payload, "backward", True) else tag


def digest(data: bytes) -> str:
    """128-bit BLAKE2b of data, hex."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def compress(data: bytes) -> bytes:
    """A zstd frame of data with its size declared and a checksum, the same from every process of this version."""
    size = len(data)
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL,
        window_log=min(max(size.bit_length(), _MIN_WINDOW_LOG), _MAX_WINDOW_LOG),
        hash_log=_LARGE_HASH_LOG if size > _LARGE_BYTES else _HASH_LOG,
        target_length=_ACCELERATION,
        write_checksum=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def declared_size(data: bytes) -> int | None:
    """What a zstd frame says that its content takes, in bytes; None where it does not say, or is no frame."""
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError:
        return None
    return None if size < 0 else int(size)


def decompress(data: bytes, *, max_bytes: int, name: str = "body") -> bytes:
    """The content of one zstd frame.

    Raises PayloadTooLarge as soon as more than max_bytes would come out (the declared size is not trusted), InvalidRequest when
    the frame is broken, truncated or followed by other bytes.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
    parts: list[bytes] = []
    total = 0
    view = memoryview(data)
    start = 0
    try:
        while start < len(view) and not decompressor.eof:
            step = max(256, (max_bytes - total) // _MAX_EXPANSION)
            part = decompressor.decompress(view[start : start + step])
            start += step
            total += len(part)
            if total > max_bytes:
                raise PayloadTooLarge(f"{name}: expands to more than {max_bytes} bytes, the limit of this server")
            parts.append(part)
    except zstandard.ZstdError as error:
        raise InvalidRequest(f"{name}: not a valid zstd frame ({error})") from error
    if not decompressor.eof:
        raise InvalidRequest(f"{name}: the zstd frame is truncated")
    if decompressor.unused_data or start < len(view):
        raise InvalidRequest(f"{name}: bytes follow the zstd frame")
    return b"".join(parts)


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, name: str) -> T:
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{name}: not valid msgpack for wire version 1 ({error})") from error
