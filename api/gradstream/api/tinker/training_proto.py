"""A protobuf ForwardBackwardRequest, decoded into views on its own bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.tinker.proto_scan import FORWARD_BACKWARD_REQUEST, check_fields
from gradstream.api.tinker.proto_views import usual_form
from gradstream.api.tinker.sparse import DenseRoom, SparseRows, dense
from gradstream.api.training_data import Array, DatumArrays, DatumColumns, TrainingData
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge, Unsupported

_DTYPES: Mapping[int, np.dtype[Any]] = {
    wire_pb2.DTYPE_FLOAT32: np.dtype("<f4"),
    wire_pb2.DTYPE_INT64: np.dtype("<i8"),
    wire_pb2.DTYPE_INT32: np.dtype("<i4"),
    wire_pb2.DTYPE_BFLOAT16: np.dtype("<u2"),
}
# A datum of one chunk and two inputs has about fifteen fields, sub-messages and all.
_FIELDS_PER_DATUM = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """message: all fields but the datums where those were read as views, else the whole of it."""

    message: wire_pb2.ForwardBackwardRequest
    datums: list[DatumArrays] | DatumColumns | None = None


def parse_request(raw: bytes, *, max_datums: int) -> ParsedRequest:
    """The message in raw.

    Raises InvalidRequest when raw is no such message, PayloadTooLarge for more than max_datums datums or far too many fields; the
    latter before any of them is built.
    """
    usual = usual_form(raw, max_datums=max_datums)
    if usual is not None:
        message = _message(usual.head)
        # A tag may be written in more bytes than it needs; such a datum was not seen.
        if not message.data:
            return ParsedRequest(message=message, datums=usual.datums)
    check_fields(raw, FORWARD_BACKWARD_REQUEST, max_fields=_FIELDS_PER_DATUM * max_datums)
    request = _message(raw)
    if len(request.data) > max_datums:
        raise PayloadTooLarge(f"data: {len(request.data)} datums; one call takes at most {max_datums}")
    return ParsedRequest(message=request)


def _message(raw: bytes) -> wire_pb2.ForwardBackwardRequest:
    try:
        return wire_pb2.ForwardBackwardRequest.FromString(raw)
    except DecodeError as error:
        raise InvalidRequest("body: not a ForwardBackwardRequest protobuf; it is truncated or malformed") from error


def training_data(parsed: ParsedRequest) -> TrainingData:
    """The request as arrays; raises InvalidRequest or Unsupported that names the datum and the field.

    Provenance spans say where tokens came from. No loss here reads them, so they are left behind: clients attach them to every datum.
    """
    request = parsed.message
    config: dict[str, float | str] = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        match value.WhichOneof("value"):
            case "number":
                config[name] = value.number
            case "text":
                config[name] = value.text
            case None:
                raise InvalidRequest(f"loss_fn_config_v2.{name}: has neither number nor text")
    datums = parsed.datums
    if datums is None:
        room = DenseRoom()
        datums = [_datum(datum, index, room) for index, datum in enumerate(request.data)]
    return TrainingData(
        datums=datums,
        loss_fn=request.loss_fn,
        loss_config=config,
        backward=not request.forward_only,
    )


def _datum(datum: wire_pb2.Datum, index: int, room: DenseRoom) -> DatumArrays:
    return DatumArrays(
        tokens=_tokens(datum, index),
        inputs={
            name: _tensor(tensor, lambda name=name: f"data[{index}].loss_fn_inputs.{name}", room)  # type: ignore[misc]
            for name, tensor in datum.loss_fn_inputs.items()
        },
    )


def _tokens(datum: wire_pb2.Datum, index: int) -> NDArray[np.int32]:
    """All text chunks end to end, int32 [T]."""
    parts: list[bytes] = []
    for place, chunk in enumerate(datum.model_input):
        field = f"data[{index}].model_input.chunks[{place}]"
        match chunk.WhichOneof("kind"):
            case "encoded_text":
                tokens = chunk.encoded_text.tokens
                if len(tokens) % 4:
                    raise InvalidRequest(f"{field}.tokens: {len(tokens)} bytes are no whole number of int32 values")
                parts.append(tokens)
            case "image" | "dmel" as kind:
                raise Unsupported(f"{field}: {kind} chunks are not supported here; this model reads text only")
            case None:
                raise InvalidRequest(f"{field}: has no content; send encoded_text")
    return np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), dtype="<i4")


def _tensor(tensor: wire_pb2.Tensor, field: Callable[[], str], room: DenseRoom) -> Array:
    """A view of the tensor's bytes in its shape (bfloat16 as float32, sparse as dense); field() names it in errors."""
    if not tensor.HasField("sparse_csr"):
        return shaped(_values(tensor.dense, tensor.dtype, field), list(tensor.shape) or None, field)
    sparse = tensor.sparse_csr
    rows = SparseRows(
        values=_values(sparse.values, tensor.dtype, field),
        crow=_values(sparse.crow_indices, wire_pb2.DTYPE_INT64, lambda: f"{field()}.crow_indices"),
        col=_values(sparse.col_indices, wire_pb2.DTYPE_INT64, lambda: f"{field()}.col_indices"),
        shape=list(tensor.shape) or None,
    )
    return dense(rows, field(), room)


def _values(raw: bytes, wire_dtype: int, field: Callable[[], str]) -> Array:
    """raw as values of the dtype, [n]; bfloat16 is widened, which is exact."""
    dtype = _DTYPES.get(wire_dtype)
    if dtype is None:
        raise InvalidRequest(f"{field()}: dtype {wire_dtype} is not known; send float32 or int64")
    if len(raw) % dtype.itemsize:
        raise InvalidRequest(f"{field()}: {len(raw)} bytes are no whole number of {dtype} values")
    values: Array = np.frombuffer(raw, dtype=dtype)
    return (values.astype("<u4") << 16).view("<f4") if wire_dtype == wire_pb2.DTYPE_BFLOAT16 else values


def shaped(values: Array, shape: list[int] | None, field: Callable[[], str]) -> Array:
    """values [n] in the shape that the client named, or as they are; raises InvalidRequest when the two disagree."""
    if shape is None or shape == [values.size]:
        return values
    num_values = 1
    for size in shape:
        num_values *= size
    if not shape or min(shape) < 0 or num_values != values.size:
        raise InvalidRequest(f"{field()}: shape {shape} does not hold its {values.size} values")
    return values.reshape(shape)
