"""A model leaves the engine's memory."""

from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import UnloadModel, UnloadModelDone


@OPS.register(UnloadModel)
@each
def unload_model(state: EngineState, job: OpJob[UnloadModel]) -> UnloadModelDone:
    """Drop the adapter with its optimizer state; raises UnknownModel when it is not here."""
    adapter = state.model(job.job)
    del state.models[adapter.model_id]
    return UnloadModelDone(model_id=adapter.model_id)
