"""The model as it is now, frozen for sampling: a named checkpoint, or one sampler's own weights."""

from gradstream.engine.adapters.adapter import Adapter, FrozenAdapter
from gradstream.engine.checkpoint.location import CheckpointKind, Location, checkpoint, ephemeral
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.checkpoint.shared import save
from gradstream.engine.memory import room_for_adapter
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.sampler.store import Resident
from gradstream.engine.state import EngineState
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import SaveForSampler, SaveForSamplerDone


@OPS.register(SaveForSampler)
@each
def save_weights_for_sampler(state: EngineState, job: OpJob[SaveForSampler]) -> SaveForSamplerDone:
    """Write the frozen adapter and keep it in memory, so that the first sample need not read it; or full weights for inference servers.

    Later training does not change it; it outlives the model and the gang. Raises UnknownModel, InvalidRequest, Unsupported (full
    weights for a sampler of this server), OutOfMemory, CheckpointExists, StorageLimit, StorageFailure.
    """
    model = state.model(job.job)
    if not isinstance(model, Adapter) and job.payload.sampler_id is not None:
        raise Unsupported(
            "save_weights_for_sampler: this server trains the full weights of its model and does not sample; save under a name, and "
            "serve that Hugging Face directory"
        )
    location = _location(job.payload, model.model_id)
    order = SaveOrder(
        location=location,
        job=job.job.future_id,
        base_model=state.config.model_name,
        ttl_seconds=job.payload.ttl_seconds,
        user_metadata=job.payload.user_metadata,
    )
    # Before anything is written: a save that has no room for it leaves no checkpoint.
    frozen = _frozen(state, model) if isinstance(model, Adapter) else None
    save(state, model, order)
    if frozen is not None:
        state.samplers.put(location.uri(), Resident(adapter=frozen, tenant=model.tenant))
    if job.payload.sampler_id is not None:
        return SaveForSamplerDone(sampler_id=job.payload.sampler_id)
    return SaveForSamplerDone(path=location.uri())


def _frozen(state: EngineState, model: Adapter) -> FrozenAdapter:
    def make() -> FrozenAdapter:
        with room_for_adapter(state.comm, what="save_weights_for_sampler"):
            return model.frozen_copy()

    return state.with_room(make)


def _location(payload: SaveForSampler, model_id: ModelId) -> Location:
    match payload.name, payload.sampler_id:
        case str(name), None:
            return checkpoint(model_id, CheckpointKind.SAMPLER_WEIGHTS, name)
        case None, str(sampler_id):
            return ephemeral(sampler_id)
        case _:
            raise InvalidRequest("exactly one of name and sampler_id must be given")
