"""Payloads as they are stored."""

from dataclasses import dataclass

from blake3 import blake3

from gradstream.shared import codec

# BLAKE2b takes nearly as long as compressing, and BLAKE3 a small part of that (`python -m bench.edge --only decode`); below, neither is felt.
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
    """What earlier versions gave for every payload.

    Redis has it of jobs that they accepted: until none of them is open, and keep_seqs others of their model have come. It is also by
    what a repeated request is known where the server numbers the jobs, since the log on disk has that name.
    """
    return codec.digest(payload)


def is_former_digest(digest: str, payload: bytes) -> bool:
    """True when an earlier version gave this digest, and this one gives another."""
    return len(payload) > _LONG_BYTES and former_digest(payload) == digest
