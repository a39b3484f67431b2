"""The datums of a ForwardBackwardRequest from the body's own bytes, when they have the form in which SDKs write them.

protobuf's own parser copies every array twice, into its message and out of it, and makes five objects for a datum. Here a datum of the
usual form is walked over once. Datums of equal size mostly differ in their arrays alone; then nothing is walked but the bytes between the
arrays compared. The arrays of datums that are alike are joined into columns straight from the body, those of others are views on it.
Whatever is not of that form is left to protobuf, and so is what stands beside the datums.

The usual form: one text chunk; dense inputs of plain dtypes, each name once; every field once. Provenance spans are passed over.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.training_data import DatumArrays, DatumColumns

_DTYPES: Mapping[int, np.dtype[Any]] = {
    wire_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    wire_pb2.DTYPE_INT64: np.dtype("<i8"),
    wire_pb2.DTYPE_INT32: np.dtype("<i4"),
}
_TOKEN = np.dtype("<i4")
# Fields of ForwardBackwardRequest, Datum, Chunk, EncodedText, an entry of loss_fn_inputs and Tensor: number * 8 + wire type.
_DATA = 3 << 3 | 2
_MODEL_INPUT, _INPUT_ENTRY, _SPANS = 1 << 3 | 2, 2 << 3 | 2, (3 << 3 | 2, 4 << 3 | 2)
_ENCODED_TEXT = _TOKENS = _KEY = _DENSE = 1 << 3 | 2
_VALUE = 2 << 3 | 2
_DTYPE, _SHAPE = 3 << 3 | 0, 4 << 3 | 2
# Sizes and dims below 2^35; larger ones are not usual.
_MAX_VARINT_BYTES = 5
# Of the fields beside the datums; more is not usual.
_MAX_HEAD_BYTES = 64 * 1024
# Inputs and spans of one datum; more is not usual.
_MAX_PARTS = 16
# Templates of this many sizes are kept, and of this many bytes each. They are compared with what comes, so it does not matter whose they are.
_MAX_LAYOUTS = 256
_MAX_TEMPLATE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Usual:
    """head: the message's bytes without its datums. datums: as columns where they are alike."""

    head: bytes
    datums: DatumColumns | list[DatumArrays]


class _Unusual(Exception):
    """Something else stands here than SDKs write."""


class _Input(NamedTuple):
    """One array of a datum: where its bytes begin and end in the datum, and how many values it has. shape None: [num_values]."""

    name: str
    dtype: np.dtype[Any]
    offset: int
    end: int
    num_values: int
    shape: tuple[int, ...] | None


class _Layout(NamedTuple):
    """Where a datum's arrays lie in it. between: all its other bytes, each stretch with its offset.

    kinds: name and dtype of each input, when all of them are [num_tokens]; else None.
    """

    tokens_offset: int
    tokens_end: int
    num_tokens: int
    inputs: tuple[_Input, ...]
    between: tuple[tuple[int, bytes], ...]
    kinds: tuple[tuple[str, np.dtype[Any]], ...] | None


# By a datum's size.
_LAYOUTS: dict[int, _Layout] = {}


def usual_form(raw: bytes, *, max_datums: int) -> Usual | None:
    """The body's datums, joined into columns or as read-only views on raw, or None when some of it is not of the usual form, is malformed, or is too much."""
    try:
        return _walk(raw, max_datums)
    except (_Unusual, IndexError, UnicodeDecodeError, DecodeError):
        return None


def _walk(raw: bytes, max_datums: int) -> Usual:
    head: list[bytes] = []
    datums: list[tuple[int, _Layout]] = []
    position, end, head_bytes = 0, len(raw), 0
    # Tag and size of the datum before, mostly those of the next one too; no datum begins with this one.
    before, size = b"\0", 0
    while position < end:
        start = position
        if raw[start] == _DATA:
            if raw.startswith(before, start):
                position += len(before)
            else:
                size, position = _varint(raw, start + 1)
                before = raw[start:position]
            stop = position + size
            if stop > end or len(datums) == max_datums:
                raise _Unusual
            layout = _LAYOUTS.get(size)
            if layout is not None:
                # True where the datum differs from the layout's in its arrays only.
                for offset, between in layout.between:
                    if not raw.startswith(between, position + offset):
                        layout = None
                        break
            if layout is None:
                layout = _layout(raw, position, stop)
                _keep(size, layout)
            datums.append((position, layout))
            position = stop
        else:
            position = _after_field(raw, position)
            head_bytes += position - start
            if position > end or head_bytes > _MAX_HEAD_BYTES:
                raise _Unusual
            head.append(raw[start:position])
    columns = _columns(raw, datums)
    return Usual(b"".join(head), columns or [_arrays(raw, start, layout) for start, layout in datums])


def _keep(size: int, layout: _Layout) -> None:
    """Keep the layout for other datums of its size, of this body and of later ones; several threads do this."""
    if sum(len(between) for _, between in layout.between) > _MAX_TEMPLATE_BYTES:
        return
    if len(_LAYOUTS) >= _MAX_LAYOUTS:
        _LAYOUTS.clear()
    _LAYOUTS[size] = layout


def _columns(raw: bytes, datums: list[tuple[int, _Layout]]) -> DatumColumns | None:
    """The datums at their places end to end, or None when they are not alike."""
    kinds = datums[0][1].kinds if datums else None
    if kinds is None or any(layout.kinds != kinds for _, layout in datums):
        return None
    view = memoryview(raw)
    tokens = [view[start + layout.tokens_offset : start + layout.tokens_end] for start, layout in datums]
    inputs = {}
    for index, (name, dtype) in enumerate(kinds):
        places = [(start, layout.inputs[index]) for start, layout in datums]
        values = [view[start + place.offset : start + place.end] for start, place in places]
        inputs[name] = dtype, b"".join(values)
    return DatumColumns(lengths=[layout.num_tokens for _, layout in datums], tokens=b"".join(tokens), inputs=inputs)


def _arrays(raw: bytes, start: int, layout: _Layout) -> DatumArrays:
    inputs = {}
    for one in layout.inputs:
        values = np.frombuffer(raw, one.dtype, one.num_values, start + one.offset)
        inputs[one.name] = values if one.shape is None else values.reshape(one.shape)
    tokens = np.frombuffer(raw, _TOKEN, layout.num_tokens, start + layout.tokens_offset)
    return DatumArrays(tokens=tokens, inputs=inputs)


def _layout(raw: bytes, start: int, end: int) -> _Layout:
    """The layout of the Datum at start."""
    tokens: tuple[int, int] | None = None
    inputs: dict[str, _Input] = {}
    position, num_parts = start, 0
    while position < end:
        tag = raw[position]
        size, position = _varint(raw, position + 1)
        stop, num_parts = position + size, num_parts + 1
        if stop > end or num_parts > _MAX_PARTS:
            raise _Unusual
        if tag == _MODEL_INPUT and tokens is None:
            tokens = _text(raw, position, stop)
        elif tag == _INPUT_ENTRY:
            entry = _entry(raw, position, stop, start)
            if entry.name in inputs:
                raise _Unusual
            inputs[entry.name] = entry
        elif tag in _SPANS:
            wire_pb2.ProvenanceSpan.FromString(raw[position:stop])
        else:
            raise _Unusual
        position = stop
    if tokens is None:
        raise _Unusual
    first, num_bytes = tokens
    first, num_tokens, found = first - start, num_bytes // _TOKEN.itemsize, tuple(inputs.values())
    taken = [(first, first + num_bytes), *((one.offset, one.end) for one in found)]
    is_plain = all(one.shape is None and one.num_values == num_tokens for one in found)
    return _Layout(
        tokens_offset=first,
        tokens_end=first + num_bytes,
        num_tokens=num_tokens,
        inputs=found,
        between=_between(raw, start, end, sorted(taken)),
        kinds=tuple((one.name, one.dtype) for one in found) if is_plain else None,
    )


def _between(raw: bytes, start: int, end: int, taken: list[tuple[int, int]]) -> tuple[tuple[int, bytes], ...]:
    """What stands around the taken stretches of a datum, each with its offset."""
    stretches = []
    offset = 0
    for begin, taken_end in taken:
        stretches.append((offset, raw[start + offset : start + begin]))
        offset = taken_end
    stretches.append((offset, raw[start + offset : end]))
    return tuple(stretches)


def _text(raw: bytes, position: int, end: int) -> tuple[int, int]:
    """Where a Chunk of text has its tokens, and their bytes."""
    if raw[position] != _ENCODED_TEXT:
        raise _Unusual
    size, position = _varint(raw, position + 1)
    if position + size != end or raw[position] != _TOKENS:
        raise _Unusual
    size, position = _varint(raw, position + 1)
    if position + size != end or not size or size % 4:
        raise _Unusual
    return position, size


def _entry(raw: bytes, position: int, end: int, datum: int) -> _Input:
    """The entry of loss_fn_inputs at position, of the Datum at datum."""
    if raw[position] != _KEY:
        raise _Unusual
    size, position = _varint(raw, position + 1)
    name = raw[position : position + size].decode()
    position += size
    if position >= end or raw[position] != _VALUE:
        raise _Unusual
    size, position = _varint(raw, position + 1)
    if position + size != end:
        raise _Unusual
    first, num_bytes, wire_dtype, shape = _tensor(raw, position, end)
    dtype = _DTYPES.get(wire_dtype)
    if dtype is None or num_bytes % dtype.itemsize:
        raise _Unusual
    num_values = num_bytes // dtype.itemsize
    if shape == [num_values]:
        shape = None
    if shape is not None and (not shape or math.prod(shape) != num_values):
        raise _Unusual
    offset = first - datum
    return _Input(name, dtype, offset, offset + num_bytes, num_values, None if shape is None else tuple(shape))


def _tensor(raw: bytes, position: int, end: int) -> tuple[int, int, int, list[int] | None]:
    """Of a dense Tensor: where its values begin, their bytes, its dtype, and its shape if it has one."""
    first = num_bytes = wire_dtype = 0
    shape: list[int] | None = None
    while position < end:
        tag = raw[position]
        value, position = _varint(raw, position + 1)
        if tag == _DTYPE and not wire_dtype:
            wire_dtype = value
            continue
        stop = position + value
        if stop > end:
            raise _Unusual
        if tag == _DENSE and not first:
            first, num_bytes = position, value
        elif tag == _SHAPE and shape is None:
            shape = _dims(raw, position, stop)
        else:
            raise _Unusual
        position = stop
    if position != end or not num_bytes:
        raise _Unusual
    return first, num_bytes, wire_dtype, shape


def _dims(raw: bytes, position: int, end: int) -> list[int]:
    dims = []
    while position < end:
        dim, position = _varint(raw, position)
        dims.append(dim)
    if position != end:
        raise _Unusual
    return dims


def _after_field(raw: bytes, position: int) -> int:
    """Where the field at position ends, whatever it is."""
    tag, position = _varint(raw, position)
    match tag & 7:
        case 0:
            while raw[position] >= 0x80:
                position += 1
            return position + 1
        case 1:
            return position + 8
        case 2:
            size, position = _varint(raw, position)
            return position + size
        case 5:
            return position + 4
        case _:
            raise _Unusual


def _varint(raw: bytes, position: int) -> tuple[int, int]:
    """The varint at position and the position after it."""
    byte = raw[position]
    if byte < 0x80:
        return byte, position + 1
    value, shift = byte & 0x7F, 7
    for offset in range(position + 1, position + _MAX_VARINT_BYTES):
        byte = raw[offset]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset + 1
        shift += 7
    raise _Unusual
