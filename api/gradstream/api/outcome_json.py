"""Numbers of outcomes as JSON, in either dialect."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np

from gradstream.shared.columns import Column
from gradstream.shared.wire import Done, ForwardBackwardDone, OptimStepDone, SampleDone


# Any: the JSON of results is free-form; each shape is the typed result of one call of a client.
def result_bytes(result: Mapping[str, Any], *, of: Done) -> bytes:
    """The JSON of a result made of this outcome. What is not finite keeps its value, as NaN or Infinity, which clients in Python read."""
    # msgspec would write null where a number is not finite.
    return msgspec.json.encode(result) if _is_finite(of) else json.dumps(result).encode()


def datum_objects(outputs: Mapping[str, Column]) -> list[dict[str, Any]]:
    """One object per datum, in order: name -> {data, dtype, shape}, with the two dtypes that JSON clients know."""
    num_datums = max((column.num_datums for column in outputs.values()), default=0)
    datums: list[dict[str, Any]] = [{} for _ in range(num_datums)]
    for name, column in outputs.items():
        dtype = "float32" if column.dtype in {"float32", "float64"} else "int64"
        for datum, array in zip(datums, column.arrays(), strict=True):
            datum[name] = {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}
    return datums


def _is_finite(done: Done) -> bool:
    """Looked at as arrays: in lists of numbers this takes a thousand times as long."""
    match done:
        case ForwardBackwardDone(outputs=outputs, metrics=metrics):
            columns = [column.values() for column in outputs.values()]
            arrays = [values for values in columns if values.dtype.kind == "f"]
            return all(np.isfinite(list(metrics.values()))) and all(
                bool(np.isfinite(values).all()) for values in arrays
            )
        case OptimStepDone(metrics=metrics):
            return all(np.isfinite(list(metrics.values())))
        case SampleDone(prompt_logprobs=prompt):
            # A position of the prompt that was not scored is NaN here, and null in the JSON.
            has_infinite = prompt is not None and bool(np.isinf(np.frombuffer(prompt, dtype="<f4")).any())
            return not has_infinite and all(
                bool(np.isfinite(np.frombuffer(logprobs, dtype="<f4")).all()) for logprobs in _logprobs(done)
            )
        case _:
            return True


def _logprobs(done: SampleDone) -> Iterator[bytes]:
    """Every array of log-probabilities but that of the prompt's own tokens: float32 little-endian."""
    for sequence in done.sequences:
        yield sequence.logprobs
    tables = [sequence.topk for sequence in done.sequences]
    for table in (*tables, done.topk_prompt, done.target_prompt, done.alt_tokens):
        if table is not None:
            yield table.logprobs
