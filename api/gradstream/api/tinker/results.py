"""Outcomes as the tinker wire shows them: protobuf for forward_backward and sample, JSON for everything and for older SDKs."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from gradstream.api.tinker.proto import wire_pb2
from gradstream.shared.columns import Column
from gradstream.shared.wire import (
    CreateModelDone,
    DeleteCheckpointDone,
    Done,
    ForwardBackwardDone,
    LoadWeightsDone,
    OptimStepDone,
    SampleDone,
    SaveExternalDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    TopK,
    UnloadModelDone,
)

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
_OUTPUT_TYPE = "ArrayRecord"
_STOP_REASONS = {"stop": wire_pb2.STOP_REASON_STOP, "length": wire_pb2.STOP_REASON_LENGTH}
_DTYPES: Mapping[str, wire_pb2.DType.ValueType] = {
    "float32": wire_pb2.DTYPE_FLOAT32,
    "int64": wire_pb2.DTYPE_INT64,
    "int32": wire_pb2.DTYPE_INT32,
}
# What an empty cell of a top-k table holds on the wire.
_EMPTY_LOGPROB = -99999.0


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A result's bytes and their media type."""

    content: bytes
    media_type: str


def render(done: Done, *, accepts_protobuf: bool) -> Rendered:
    """The result's bytes for a client."""
    if accepts_protobuf and isinstance(done, ForwardBackwardDone):
        return Rendered(content=_forward_backward_proto(done).SerializeToString(), media_type=PROTOBUF)
    if accepts_protobuf and isinstance(done, SampleDone):
        return Rendered(content=_sample_proto(done).SerializeToString(), media_type=PROTOBUF)
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


def _sample_proto(done: SampleDone) -> wire_pb2.SampleResponse:
    return wire_pb2.SampleResponse(
        sequences=[
            wire_pb2.SampledSequence(
                stop_reason=_STOP_REASONS[sequence.stop_reason],
                tokens=sequence.tokens,
                logprobs=sequence.logprobs,
                topk_sampled_logprobs=None if sequence.topk is None else _topk_proto(sequence.topk),
            )
            for sequence in done.sequences
        ],
        prompt_logprobs=done.prompt_logprobs,
        topk_prompt_logprobs=None if done.topk_prompt is None else _topk_proto(done.topk_prompt),
    )


def _topk_proto(topk: TopK) -> wire_pb2.TopkLogprobs:
    return wire_pb2.TopkLogprobs(token_ids=topk.token_ids, logprobs=topk.logprobs, k=topk.k, length=topk.length)


# Any: the JSON of results is free-form; each shape is the typed result of one call of the SDK.
def _json_result(done: Done) -> dict[str, Any]:
    match done:
        case CreateModelDone() | UnloadModelDone():
            return {"type": done.__struct_config__.tag, "model_id": done.model_id}
        case ForwardBackwardDone():
            return {
                "loss_fn_output_type": _OUTPUT_TYPE,
                "loss_fn_outputs": _json_outputs(done.outputs),
                "metrics": done.metrics,
            }
        case OptimStepDone():
            return {"metrics": done.metrics}
        case SaveWeightsDone() | DeleteCheckpointDone():
            return {"type": done.__struct_config__.tag, "path": done.path}
        case LoadWeightsDone():
            return {"type": "load_weights", "path": done.path, "model_id": done.model_id}
        case SaveForSamplerDone():
            return {"type": "save_weights_for_sampler", "path": done.path, "sampling_session_id": done.sampler_id}
        case SaveExternalDone():
            return {"type": "save_weights_external", "path": done.path, "size_bytes": done.size_bytes}
        case SampleDone():
            return _json_sample(done)


def _json_outputs(outputs: Mapping[str, Column]) -> list[dict[str, Any]]:
    """One object per datum: name -> {data, dtype, shape}, with the two dtypes that JSON clients know."""
    num_datums = max((column.num_datums for column in outputs.values()), default=0)
    datums: list[dict[str, Any]] = [{} for _ in range(num_datums)]
    for name, column in outputs.items():
        dtype = "float32" if column.dtype in {"float32", "float64"} else "int64"
        for datum, array in zip(datums, column.arrays(), strict=True):
            datum[name] = {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}
    return datums


def _json_sample(done: SampleDone) -> dict[str, Any]:
    result: dict[str, Any] = {"type": "sample", "sequences": []}
    for sequence in done.sequences:
        item: dict[str, Any] = {
            "stop_reason": sequence.stop_reason,
            "tokens": np.frombuffer(sequence.tokens, dtype="<i4").tolist(),
            "logprobs": np.frombuffer(sequence.logprobs, dtype="<f4").tolist(),
        }
        if sequence.topk is not None:
            item["topk_logprobs"] = _json_topk(sequence.topk)
        result["sequences"].append(item)
    if done.prompt_logprobs is not None:
        logprobs = np.frombuffer(done.prompt_logprobs, dtype="<f4")
        result["prompt_logprobs"] = [None if np.isnan(value) else float(value) for value in logprobs]
    if done.topk_prompt is not None:
        result["topk_prompt_logprobs"] = _json_topk(done.topk_prompt)
    return result


def _json_topk(topk: TopK) -> list[list[tuple[int, float]] | None]:
    """Per position its candidates as (token id, logprob), None where there are none."""
    token_ids = np.frombuffer(topk.token_ids, dtype="<i4").reshape(topk.length, topk.k)
    logprobs = np.frombuffer(topk.logprobs, dtype="<f4").reshape(topk.length, topk.k)
    rows: list[list[tuple[int, float]] | None] = []
    for row_ids, row_logprobs in zip(token_ids.tolist(), logprobs.tolist(), strict=True):
        cells = [cell for cell in zip(row_ids, row_logprobs, strict=True) if cell[1] > _EMPTY_LOGPROB]
        rows.append(cells or None)
    return rows


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
