"""A full-weight model goes to host memory, or comes back."""

import torch

from gradstream.engine.models.full import FullModel
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.errors import Unsupported
from gradstream.shared.wire import OffloadModel, OffloadModelDone


@OPS.register(OffloadModel)
@each
def offload_model(state: EngineState, job: OpJob[OffloadModel]) -> OffloadModelDone:
    """Move weights, gradient and optimizer state; a model that is there already stays as it is.

    Raises UnknownModel, and Unsupported for an adapter: it takes little room, and the base model that it is on serves others.
    """
    model = state.held(job.job)
    asleep = job.payload.asleep
    if not isinstance(model, FullModel):
        raise Unsupported("sleep: this server trains LoRA adapters, and only a full-weight model can leave the device")
    num_bytes = model.move(torch.device("cpu") if asleep else state.flat.device)
    model.is_asleep = asleep
    return OffloadModelDone(model_id=model.model_id, asleep=asleep, bytes_moved=num_bytes)
