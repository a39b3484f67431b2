"""A checkpoint put into a model, or an adapter's made into one."""

from gradstream.engine.adapters.adapter import Adapter, Owner, new_adapter
from gradstream.engine.checkpoint.full_load import FullOrder, load_full
from gradstream.engine.checkpoint.location import parse_uri
from gradstream.engine.checkpoint.shared import load, put
from gradstream.engine.memory import room_for_adapter
from gradstream.engine.models.full import FullModel
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.engine.trained import Training
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import ModelId, SessionId
from gradstream.shared.wire import LoadWeights, LoadWeightsDone


@OPS.register(LoadWeights)
@each
def load_weights(state: EngineState, job: OpJob[LoadWeights]) -> LoadWeightsDone:
    """Load in place, or make the model when the payload says create.

    Without the optimizer its moments and step start fresh; the accumulated gradient is gone either way. Sampler weights may be
    loaded too, without an optimizer. Raises UnknownModel (model or checkpoint), InvalidRequest, OutOfMemory, StorageFailure.
    """
    model = _create(state, job) if job.payload.create else _load_in_place(state, job)
    return LoadWeightsDone(path=job.payload.path, model_id=model.model_id)


def _session_of(state: EngineState, job: OpJob[LoadWeights]) -> SessionId:
    """The session that the new model belongs to; raises InvalidRequest when the model cannot be made."""
    if not state.config.is_lora:
        raise Unsupported(
            "load_weights: this server trains the full weights of its model, which cannot be made from an adapter's checkpoint"
        )
    if ModelId(job.job.owner) in state.models:
        raise InvalidRequest(f"model {job.job.owner} exists already")
    if job.payload.session_id is None:
        raise InvalidRequest("session_id: a model that is made from a checkpoint needs one")
    return job.payload.session_id


def _create(state: EngineState, job: OpJob[LoadWeights]) -> Adapter:
    """The new model, entered only after the checkpoint was read."""
    session_id = _session_of(state, job)
    content = load(state, parse_uri(job.payload.path), tenant=job.job.tenant, with_optimizer=job.payload.with_optimizer)
    owner = Owner(
        model_id=ModelId(job.job.owner),
        tenant=job.job.tenant,
        session_id=session_id,
        spec=content.manifest.adapter,
        user_metadata=job.payload.user_metadata,
    )
    optimizer = content.manifest.optimizer if content.has_optimizer else state.config.optimizer
    state.models.make_room()

    def make() -> Adapter:
        with room_for_adapter(state.comm, what="load_weights"):
            return new_adapter(
                owner,
                base_sites=state.base.sites,
                lora_alpha=state.config.lora_alpha,
                engine_seed=state.config.seed,
                device=state.base.device,
                training=Training(optimizer=optimizer),
            )

    model = state.with_room(make)
    put(state, model, content)
    state.models[model.model_id] = model
    return model


def _load_in_place(state: EngineState, job: OpJob[LoadWeights]) -> Adapter | FullModel:
    model = state.model(job.job)
    location, payload = parse_uri(job.payload.path), job.payload
    if isinstance(model, FullModel):
        order = FullOrder(
            directory=location.directory(state.config.output_dir),
            source=location.uri(),
            tenant=job.job.tenant,
            base_models=state.base_names,
            with_optimizer=payload.with_optimizer,
        )
        load_full(state, model, order)
        return model
    content = load(
        state,
        location,
        tenant=job.job.tenant,
        with_optimizer=payload.with_optimizer,
        expected=model.spec,
        optimizer=model.optimizer,
    )
    put(state, model, content)
    return model
