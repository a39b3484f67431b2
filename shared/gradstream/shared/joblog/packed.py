"""Payloads as they are stored."""

from dataclasses import dataclass

from gradstream.shared import codec


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A payload as stored: data is zstd-compressed when enc is zstd. digest is that of the payload itself."""

    data: bytes
    enc: str
    digest: str

    @classmethod
    def of(cls, payload: bytes) -> "Packed":
        """Compress and digest payload; a few milliseconds per megabyte, without the GIL for most of it."""
        digest = codec.digest(payload)
        if len(payload) > codec.COMPRESS_ABOVE_BYTES:
            frame = codec.compress(payload)
            if len(frame) < len(payload):
                return cls(data=frame, enc="zstd", digest=digest)
        return cls(data=payload, enc="raw", digest=digest)
