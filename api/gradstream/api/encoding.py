"""Payloads on their way into a submission."""

from dataclasses import dataclass

from gradstream.shared import codec
from gradstream.shared.joblog.packed import Packed
from gradstream.shared.wire import ForwardBackward, Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A payload's bytes and what the queue wants to know of it. packed: as it will be stored, where that is done already."""

    op: str
    payload: bytes
    num_tokens: int = 0
    packed: Packed | None = None


def encoded(payload: Payload) -> Encoded:
    """The payload as it is submitted; one that is small."""
    return Encoded(op=codec.op_of(payload), payload=codec.encode(payload))


def encoded_training(payload: ForwardBackward) -> Encoded:
    """The payload as it is submitted, packed already: a few milliseconds per megabyte, most of them without the GIL."""
    data = codec.encode(payload)
    return Encoded(op=codec.op_of(payload), payload=data, num_tokens=payload.tokens.num_values, packed=Packed.of(data))
