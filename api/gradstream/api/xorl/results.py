"""Outcomes as xorl clients read them."""

from typing import Any

from gradstream.api.names import shown
from gradstream.api.outcome_json import datum_objects, result_bytes
from gradstream.shared.ids import name_of
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
    """The result's JSON."""
    return result_bytes(_result(done), of=done)


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
                "loss_fn_outputs": datum_objects(done.outputs),
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
