"""A model leaves the engine's memory."""

from gradstream.engine.models.full import FullModel
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import UnloadModel, UnloadModelDone


@OPS.register(UnloadModel)
@each
def unload_model(state: EngineState, job: OpJob[UnloadModel]) -> UnloadModelDone:
    """Drop the model with its optimizer state, asleep or not; raises UnknownModel when it is not here."""
    model = state.held(job.job)
    if isinstance(model, FullModel) and model.is_asleep:
        state.flat.move(state.flat.device)
    del state.models[model.model_id]
    return UnloadModelDone(model_id=model.model_id)
