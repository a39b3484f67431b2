"""A walk over the bytes of a protobuf message that counts its fields before anything is built from them.

The parser holds the interpreter while it works, and an empty sub-message takes two bytes on the wire and forty in memory: without
this, one body of 64 MB stops the server for seconds and takes a gigabyte.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gradstream.shared.errors import InvalidRequest, PayloadTooLarge

# The worst that fits in here is parsed in some ten milliseconds into a few megabytes.
HARMLESS_BYTES = 128 * 1024
_MAX_VARINT_BYTES = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one message type: which fields hold messages to walk into, and which hold at most so many bytes."""

    messages: Mapping[int, "Shape"] = field(default_factory=dict)
    max_bytes: Mapping[int, int] = field(default_factory=dict)


_TEXT = Shape()
_CHUNK = Shape(messages={1: _TEXT})
# A tensor's shape has a few sizes; packed, each takes one byte here and eight in memory.
_TENSOR = Shape(max_bytes={4: 256})
_INPUT_ENTRY = Shape(messages={2: _TENSOR})
_DATUM = Shape(messages={1: _CHUNK, 2: _INPUT_ENTRY})
FORWARD_BACKWARD_REQUEST = Shape(messages={3: _DATUM})


def check_fields(raw: bytes, shape: Shape, *, max_fields: int) -> None:
    """Raise PayloadTooLarge when raw has more than max_fields fields, at all depths of shape together.

    Raises InvalidRequest when lengths do not add up. Costs about a microsecond a field; small messages are let through unseen.
    """
    if len(raw) <= HARMLESS_BYTES:
        return
    # Messages that are still to be walked: where each begins and ends.
    open_messages: list[tuple[int, int, Shape]] = [(0, len(raw), shape)]
    num_fields = 0
    while open_messages:
        position, end, current = open_messages.pop()
        while position < end:
            num_fields += 1
            if num_fields > max_fields:
                raise PayloadTooLarge(f"body: more than {max_fields} protobuf fields; send fewer datums in one call")
            tag = raw[position]
            if tag < 0x80:
                position += 1
            else:
                tag, position = _varint(raw, position, end)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == 2:
                size, position = _varint(raw, position, end)
                inner = current.messages.get(number)
                if inner is not None:
                    open_messages.append((position, min(position + size, end), inner))
                elif size > current.max_bytes.get(number, size):
                    raise InvalidRequest(
                        f"body: {size} bytes in a field that takes {current.max_bytes[number]} at most"
                    )
                position += size
            else:
                position = _after_scalar(raw, position, end, wire_type)
        if position > end:
            raise InvalidRequest("body: not a ForwardBackwardRequest protobuf; it is truncated")


def _after_scalar(raw: bytes, position: int, end: int, wire_type: int) -> int:
    match wire_type:
        case 0:
            return _varint(raw, position, end)[1]
        case 1:
            return position + 8
        case 5:
            return position + 4
        case _:
            raise InvalidRequest(
                f"body: not a ForwardBackwardRequest protobuf; wire type {wire_type} at byte {position}"
            )


def _varint(raw: bytes, position: int, end: int) -> tuple[int, int]:
    """The varint at position and the position after it."""
    value = shift = 0
    for offset in range(position, min(position + _MAX_VARINT_BYTES, end)):
        byte = raw[offset]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset + 1
        shift += 7
    raise InvalidRequest("body: not a ForwardBackwardRequest protobuf; it is truncated or malformed")
