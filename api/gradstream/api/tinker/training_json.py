"""JSON training bodies of the older SDKs, decoded with types: lists become arrays once, here."""

from typing import Literal

import msgspec
import numpy as np

from gradstream.api.body import typed
from gradstream.api.tinker.sparse import DenseRoom, SparseRows, dense
from gradstream.api.tinker.training_proto import shaped
from gradstream.api.training_data import Array, DatumArrays, TrainingData
from gradstream.shared.errors import InvalidRequest, PayloadTooLarge, Unsupported


class Chunk(msgspec.Struct):
    """Text when it has tokens. The other kinds are recognised by their type to be refused by name; their content is skipped.

    Old SDKs leave the type of a text chunk out, as it is the default.
    """

    type: str = "encoded_text"
    tokens: list[int] | None = None


class ModelInput(msgspec.Struct, forbid_unknown_fields=True):
    chunks: list[Chunk]


class Tensor(msgspec.Struct, forbid_unknown_fields=True):
    data: list[int | float]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Datum(msgspec.Struct, forbid_unknown_fields=True):
    model_input: ModelInput
    loss_fn_inputs: dict[str, Tensor] = {}


class ForwardInput(msgspec.Struct, forbid_unknown_fields=True):
    data: list[Datum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackwardBody(msgspec.Struct, forbid_unknown_fields=True):
    """What /forward_backward takes as JSON."""

    forward_backward_input: ForwardInput
    model_id: str
    seq_id: int | None = None
    type: str | None = None


class ForwardBody(msgspec.Struct, forbid_unknown_fields=True):
    """What /forward takes; older SDKs only."""

    forward_input: ForwardInput
    model_id: str
    seq_id: int | None = None
    type: str | None = None


_FORWARD_BACKWARD = msgspec.json.Decoder(ForwardBackwardBody)
_FORWARD = msgspec.json.Decoder(ForwardBody)


def parse_forward_backward(raw: bytes) -> ForwardBackwardBody:
    """The body of /forward_backward; raises InvalidRequest naming the first wrong field."""
    return typed(_FORWARD_BACKWARD, raw)


def parse_forward(raw: bytes) -> ForwardBody:
    """The body of /forward; raises InvalidRequest naming the first wrong field."""
    return typed(_FORWARD, raw)


def training_data(body: ForwardInput, *, backward: bool, max_datums: int) -> TrainingData:
    """The body as arrays; raises InvalidRequest or Unsupported that names the datum and the field."""
    if len(body.data) > max_datums:
        raise PayloadTooLarge(f"data: {len(body.data)} datums; one call takes at most {max_datums}")
    room = DenseRoom()
    return TrainingData(
        datums=[
            DatumArrays(
                tokens=text_tokens(datum.model_input, f"data[{index}].model_input"),
                inputs={
                    name: _array(tensor, f"data[{index}].loss_fn_inputs.{name}", room)
                    for name, tensor in datum.loss_fn_inputs.items()
                },
            )
            for index, datum in enumerate(body.data)
        ],
        loss_fn=body.loss_fn,
        loss_config=body.loss_fn_config or {},
        backward=backward,
    )


def text_tokens(model_input: ModelInput, field: str) -> Array:
    """All text chunks end to end, int64 [T]; the caller checks the ids."""
    tokens: list[int] = []
    for place, chunk in enumerate(model_input.chunks):
        if chunk.type != "encoded_text":
            raise Unsupported(
                f"{field}.chunks[{place}]: {chunk.type[:80]} chunks are not supported here; this model reads text only"
            )
        if chunk.tokens is None:
            raise InvalidRequest(f"{field}.chunks[{place}]: has no tokens; send encoded_text")
        tokens.extend(chunk.tokens)
    return _whole_numbers(tokens, f"{field}.tokens")


def _whole_numbers(values: list[int] | list[int | float], field: str) -> Array:
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError as error:
        raise InvalidRequest(f"{field}: a value does not fit in int64") from error


def _array(tensor: Tensor, field: str, room: DenseRoom) -> Array:
    values: Array
    if tensor.dtype == "float32":
        values = _float32(tensor.data, field)
    else:
        if any(isinstance(value, float) for value in tensor.data):
            raise InvalidRequest(f"{field}: dtype int64, but it holds fractions; send whole numbers")
        values = _whole_numbers(tensor.data, field)
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if crow is None and col is None:
        return shaped(values, tensor.shape, lambda: field)
    if crow is None or col is None:
        raise InvalidRequest(
            f"{field}: sparse_crow_indices and sparse_col_indices belong together; send both or neither"
        )
    rows = SparseRows(
        values=values,
        crow=_whole_numbers(crow, f"{field}.sparse_crow_indices"),
        col=_whole_numbers(col, f"{field}.sparse_col_indices"),
        shape=tensor.shape,
    )
    return dense(rows, field, room)


def _float32(values: list[int | float], field: str) -> Array:
    try:
        wide = np.array(values, dtype=np.float64)
    except OverflowError as error:
        raise InvalidRequest(f"{field}: a value does not fit in float32") from error
    # A value beyond float32 becomes infinite here, and the check of finiteness names it.
    with np.errstate(over="ignore"):
        return wide.astype(np.float32)
