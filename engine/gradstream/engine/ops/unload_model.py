"""A model leaves the engine's memory."""

from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import UnloadModel, UnloadModelDone


@OPS.register(UnloadModel)
@each
def unload_model(state: EngineState, job: OpJob[UnloadModel]) -> UnloadModelDone:
    """Drop the model with its optimizer state, asleep or not; raises UnknownModel when it is not here.

    The base model's weights stay where they are: a device that was made free for others is theirs until the next model is made.
    """
    model = state.held(job.job)
    del state.models[model.model_id]
    return UnloadModelDone(model_id=model.model_id)
