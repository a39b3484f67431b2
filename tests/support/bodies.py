"""Request bodies in the shapes that the SDKs send."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstream.api.tinker.proto import wire_pb2

_DTYPES = {"float32": wire_pb2.DTYPE_FLOAT32, "int64": wire_pb2.DTYPE_INT64, "int32": wire_pb2.DTYPE_INT32}


def proto_tensor(values: Any, dtype: str) -> wire_pb2.Tensor:
    """A dense tensor with its shape."""
    array = np.asarray(values, dtype=dtype)
    return wire_pb2.Tensor(dense=array.tobytes(), dtype=_DTYPES[dtype], shape=array.shape)


def proto_datum(tokens: Sequence[int], inputs: Mapping[str, tuple[Any, str]]) -> wire_pb2.Datum:
    """One text chunk and dense inputs given as (values, dtype)."""
    text = wire_pb2.EncodedText(tokens=np.asarray(tokens, dtype="<i4").tobytes())
    return wire_pb2.Datum(
        model_input=[wire_pb2.Chunk(encoded_text=text)],
        loss_fn_inputs={name: proto_tensor(values, dtype) for name, (values, dtype) in inputs.items()},
    )


def good_datum(tokens: Sequence[int] = (1, 2, 3)) -> wire_pb2.Datum:
    """A cross_entropy datum that the uniform card takes."""
    return proto_datum(tokens, {"target_tokens": (list(tokens), "int64"), "weights": ([0.5] * len(tokens), "float32")})


def proto_request(
    model_id: str, seq_id: int, data: Sequence[wire_pb2.Datum], **fields: Any
) -> wire_pb2.ForwardBackwardRequest:
    """A cross_entropy request unless loss_fn says otherwise."""
    return wire_pb2.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, data=data, **{"loss_fn": "cross_entropy", **fields}
    )


def json_datum(tokens: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """good_datum as the JSON SDKs write it."""
    return {
        "model_input": {"chunks": [{"tokens": list(tokens), "type": "encoded_text"}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": list(tokens), "dtype": "int64", "shape": [len(tokens)]},
            "weights": {"data": [0.5] * len(tokens), "dtype": "float32", "shape": [len(tokens)]},
        },
    }


def json_request(
    model_id: str, seq_id: int, data: Sequence[dict[str, Any]], *, forward: bool = False
) -> dict[str, Any]:
    """The body of /forward_backward, or of /forward."""
    field = "forward_input" if forward else "forward_backward_input"
    return {field: {"data": list(data), "loss_fn": "cross_entropy"}, "model_id": model_id, "seq_id": seq_id}
