"""Outcomes as xorl clients read them."""

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from gradstream.api.names import name_of, shown
from gradstream.shared.columns import Column
from gradstream.shared.wire import (
    CreateModelDone,
    DeleteCheckpointDone,
    Done,
    ForwardBackwardDone,
    LoadWeightsDone,
    OffloadModelDone,
    OptimStepDone,
    ResetModelDone,
    SaveForSamplerDone,
    SaveWeightsDone,
    UnloadModelDone,
)

_OUTPUT_TYPE = "CrossEntropyLossReturn"


def outcome_json(done: Done) -> bytes:
    """The result's JSON. What is not finite keeps its value, as NaN or Infinity, which clients in Python read."""
    result = _result(done)
    # msgspec would write null where a number is not finite.
    return json.dumps(result).encode() if _holds_nonfinite(done) else msgspec.json.encode(result)


# Any: the JSON of results is free-form; each shape is the typed result of one call of the client.
def _result(done: Done) -> dict[str, Any]:
    match done:
        case CreateModelDone(model_id=model) | UnloadModelDone(model_id=model) | ResetModelDone(model_id=model):
            return {"type": done.__struct_config__.tag, "model_id": name_of(model)}
        case OffloadModelDone(model_id=model, asleep=asleep):
            return {"type": "offload_model", "model_id": name_of(model), "asleep": asleep}
        case ForwardBackwardDone():
            return {
                "loss_fn_output_type": _OUTPUT_TYPE,
                "loss_fn_outputs": _datums(done.outputs),
                "metrics": done.metrics,
                "info": {},
            }
        case OptimStepDone(metrics=metrics):
            rate = {"learning_rate": metrics["lr"]} if "lr" in metrics else {}
            return {"metrics": {**metrics, **rate}, "info": {}}
        case SaveWeightsDone(path=path) | LoadWeightsDone(path=path) | SaveForSamplerDone(path=str(path)):
            return {"path": shown(path)}
        case DeleteCheckpointDone(path=path):
            return {"success": True, "deleted_path": shown(path)}
        case _:
            raise TypeError(f"{type(done).__name__} is no outcome of a xorl client's job")


def _datums(outputs: Mapping[str, Column]) -> list[dict[str, Any]]:
    """One object per datum, in order: name -> {data, dtype, shape}."""
    num_datums = max((column.num_datums for column in outputs.values()), default=0)
    datums: list[dict[str, Any]] = [{} for _ in range(num_datums)]
    for name, column in outputs.items():
        dtype = "float32" if column.dtype in {"float32", "float64"} else "int64"
        for datum, array in zip(datums, column.arrays(), strict=True):
            datum[name] = {"data": array.ravel().tolist(), "dtype": dtype, "shape": list(array.shape)}
    return datums


def _holds_nonfinite(done: Done) -> bool:
    match done:
        case ForwardBackwardDone(outputs=outputs, metrics=metrics):
            columns = [column.values() for column in outputs.values()]
            return not (
                all(np.isfinite(list(metrics.values())))
                and all(bool(np.isfinite(values).all()) for values in columns if values.dtype.kind == "f")
            )
        case OptimStepDone(metrics=metrics):
            return not all(np.isfinite(list(metrics.values())))
        case _:
            return False
