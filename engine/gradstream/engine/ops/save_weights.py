"""A training checkpoint: the model with its optimizer, under a name."""

from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.checkpoint.shared import save
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import SaveWeights, SaveWeightsDone


@OPS.register(SaveWeights)
@each
def save_weights(state: EngineState, job: OpJob[SaveWeights]) -> SaveWeightsDone:
    """Write the checkpoint. Raises UnknownModel, InvalidRequest (name, asleep), CheckpointExists, StorageLimit, StorageFailure."""
    model = state.model(job.job)
    payload = job.payload
    location = checkpoint(model.model_id, CheckpointKind.WEIGHTS, payload.name)
    order = SaveOrder(
        location=location,
        job=job.job.future_id,
        base_model=state.config.model_name,
        overwrite=payload.overwrite,
        ttl_seconds=payload.ttl_seconds,
        user_metadata=payload.user_metadata,
    )
    save(state, model, order)
    state.samplers.drop(location.uri())
    return SaveWeightsDone(path=location.uri())
