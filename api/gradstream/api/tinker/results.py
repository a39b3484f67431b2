"""Outcomes as the tinker wire shows them: protobuf for forward_backward and sample, JSON for everything and for older SDKs."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from gradstream.api.tinker.proto import wire_pb2
from gradstream.api.tinker.sampling_results import sample_json, sample_proto
from gradstream.shared.columns import Column
from gradstream.shared.wire import (
    CopyCheckpointDone,
    CreateModelDone,
    DeleteCheckpointDone,
    Done,
    ForwardBackwardDone,
    LoadWeightsDone,
    OffloadModelDone,
    OptimStepDone,
    ResetModelDone,
    RestoreSnapshotDone,
    SampleDone,
    SaveExternalDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    UnloadModelDone,
)

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
_OUTPUT_TYPE = "ArrayRecord"
_DTYPES: Mapping[str, wire_pb2.DType.ValueType] = {
    "float32": wire_pb2.DTYPE_FLOAT32,
    "int64": wire_pb2.DTYPE_INT64,
    "int32": wire_pb2.DTYPE_INT32,
}


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A result's bytes and their media type."""

    content: bytes
    media_type: str


def render(done: Done, *, accepts_protobuf: bool) -> Rendered:
    """The result's bytes for a client: the same from every process, so entries of protobuf maps go in the order of their names."""
    if accepts_protobuf and isinstance(done, ForwardBackwardDone):
        return Rendered(
            content=_forward_backward_proto(done).SerializeToString(deterministic=True), media_type=PROTOBUF
        )
    if accepts_protobuf and isinstance(done, SampleDone):
        return Rendered(content=sample_proto(done).SerializeToString(deterministic=True), media_type=PROTOBUF)
    return Rendered(content=_json_bytes(_json_result(done)), media_type=JSON)


def _forward_backward_proto(done: ForwardBackwardDone) -> wire_pb2.ForwardBackwardOutput:
    fields = {name: _batched(column) for name, column in done.outputs.items()}
    num_datums = max((column.num_datums for column in done.outputs.values()), default=0)
    record = wire_pb2.ArrayRecord(type_tag=_OUTPUT_TYPE, fields=fields, num_datums=num_datums)
    return wire_pb2.ForwardBackwardOutput(
        loss_fn_output_type=_OUTPUT_TYPE, loss_fn_outputs=[record] if num_datums else [], metrics=done.metrics
    )


def _batched(column: Column) -> wire_pb2.BatchedTensor:
    """The column with byte offsets in place of lengths; float64 goes out as float32, the widest float of the wire."""
    values = column.values()
    if column.dtype == "float64":
        values = values.astype("<f4")
    row_bytes = values.dtype.itemsize * int(np.prod(column.trailing, dtype=np.int64))
    offsets = np.zeros(column.num_datums + 1, dtype="<i8")
    np.cumsum(column.lengths_array() * row_bytes, out=offsets[1:])
    return wire_pb2.BatchedTensor(
        data=values.tobytes() if column.dtype == "float64" else column.data,
        offsets=offsets.tobytes(),
        dtype=_DTYPES["float32" if column.dtype == "float64" else column.dtype],
        trailing_shape=column.trailing,
    )


# Any: the JSON of results is free-form; each shape is the typed result of one call of the SDK.
def _json_result(done: Done) -> dict[str, Any]:
    match done:
        case CreateModelDone() | UnloadModelDone() | ResetModelDone() | OffloadModelDone():
            return {"type": done.__struct_config__.tag, "model_id": done.model_id}
        case ForwardBackwardDone():
            return {
                "loss_fn_output_type": _OUTPUT_TYPE,
                "loss_fn_outputs": _json_outputs(done.outputs),
                "metrics": done.metrics,
            }
        case OptimStepDone():
            return {"metrics": done.metrics}
        case SaveWeightsDone() | DeleteCheckpointDone() | CopyCheckpointDone():
            return {"type": done.__struct_config__.tag, "path": done.path}
        case LoadWeightsDone():
            return {"type": "load_weights", "path": done.path, "model_id": done.model_id}
        case SaveForSamplerDone():
            return {"type": "save_weights_for_sampler", "path": done.path, "sampling_session_id": done.sampler_id}
        case SaveExternalDone():
            return {"type": "save_weights_external", "path": done.path, "size_bytes": done.size_bytes}
        case SampleDone():
            return sample_json(done)
        case RestoreSnapshotDone():
            raise TypeError("the gang's own job was taken for a client's")


def _json_outputs(outputs: Mapping[str, Column]) -> list[dict[str, Any]]:
    """One object per datum: name -> {data, dtype, shape}, with the two dtypes that JSON clients know."""
    num_datums = max((column.num_datums for column in outputs.values()), default=0)
    datums: list[dict[str, Any]] = [{} for _ in range(num_datums)]
    for name, column in outputs.items():
        dtype = "float32" if column.dtype in {"float32", "float64"} else "int64"
        for datum, array in zip(datums, column.arrays(), strict=True):
            datum[name] = {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}
    return datums


def _json_bytes(value: dict[str, Any]) -> bytes:
    """JSON of a result. A metric or log-probability that is not finite keeps its value, as NaN or Infinity, which the SDK reads."""
    if _holds_nonfinite(value):
        return json.dumps(value).encode()
    return msgspec.json.encode(value)


def _holds_nonfinite(value: object) -> bool:
    if isinstance(value, float):
        return not np.isfinite(value)
    if isinstance(value, dict):
        return any(_holds_nonfinite(item) for item in value.values())
    if isinstance(value, list):
        if value and all(type(item) is float for item in value):
            return not bool(np.isfinite(value).all())
        return any(_holds_nonfinite(item) for item in value if isinstance(item, list | dict | float))
    return False
