"""Payloads as they are stored."""

from dataclasses import dataclass

from blake3 import blake3

from gradstream.shared import codec

# BLAKE2b takes a millisecond for a megabyte, as long as compressing it, and BLAKE3 a tenth of that; below, neither is felt.
_LONG_BYTES = 64 * 1024
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A payload as stored: data is zstd-compressed when enc is zstd. digest is `payload_digest` of the payload itself."""

    data: bytes
    enc: str
    digest: str

    @classmethod
    def of(cls, payload: bytes) -> "Packed":
        """Compress and digest payload; a few milliseconds per megabyte, without the GIL for most of it."""
        digest = payload_digest(payload)
        if len(payload) > codec.COMPRESS_ABOVE_BYTES:
            frame = codec.compress(payload)
            if len(frame) < len(payload):
                return cls(data=frame, enc="zstd", digest=digest)
        return cls(data=payload, enc="raw", digest=digest)


def payload_digest(payload: bytes) -> str:
    """128 bits in hex, of BLAKE3 for long payloads and of BLAKE2b for others; what makes two submissions of one seq the same."""
    return blake3(payload).hexdigest(length=_DIGEST_BYTES) if len(payload) > _LONG_BYTES else former_digest(payload)


def former_digest(payload: bytes) -> str:
    """What earlier versions gave for every payload. Redis may have it of jobs that they accepted."""
    return codec.digest(payload)
