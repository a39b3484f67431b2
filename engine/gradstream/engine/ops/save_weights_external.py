"""The model as files that a client downloads: an adapter for peft, or full weights for transformers."""

from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.checkpoint.shared import save
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import SaveExternal, SaveExternalDone


@OPS.register(SaveExternal)
@each
def save_weights_external(state: EngineState, job: OpJob[SaveExternal]) -> SaveExternalDone:
    """Write the export. Raises UnknownModel, InvalidRequest (name), CheckpointExists, StorageLimit, StorageFailure."""
    model = state.model(job.job)
    location = checkpoint(model.model_id, CheckpointKind.EXTERNAL_WEIGHTS, job.payload.name)
    order = SaveOrder(
        location=location,
        job=job.job.future_id,
        base_model=state.config.model_name,
        ttl_seconds=job.payload.ttl_seconds,
        user_metadata=job.payload.user_metadata,
    )
    size_bytes = save(state, model, order)
    return SaveExternalDone(path=location.uri(), size_bytes=size_bytes)
