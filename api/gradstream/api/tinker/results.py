"""Outcomes as the tinker wire shows them: protobuf for forward_backward and sample, JSON for everything and for older SDKs."""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from gradstream.api.outcome_json import datum_objects, result_bytes
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
    return Rendered(content=result_bytes(_json_result(done), of=done), media_type=JSON)


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
                "loss_fn_outputs": datum_objects(done.outputs),
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
