"""A fresh adapter on the base model."""

from gradstream.engine.adapters.adapter import Owner, new_adapter
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.errors import InvalidRequest, Unsupported
from gradstream.shared.ids import ModelId
from gradstream.shared.wire import CreateModel, CreateModelDone


@OPS.register(CreateModel)
@each
def create_model(state: EngineState, job: OpJob[CreateModel]) -> CreateModelDone:
    """Make the adapter. Raises InvalidRequest for another base model, a rank out of bounds, nothing to train, or a taken id."""
    model_id = ModelId(job.job.owner)
    payload = job.payload
    if model_id in state.models:
        raise InvalidRequest(f"model {model_id} exists already")
    names = (state.config.model_name, *state.config.model_aliases)
    if payload.base_model not in names:
        raise InvalidRequest(f"base_model: {payload.base_model!r} is not served here; use {' or '.join(names)}")
    if payload.lora is None:
        raise Unsupported("create_model: this engine trains adapters; name a LoRA rank")
    if not 1 <= payload.lora.rank <= state.config.max_lora_rank:
        raise InvalidRequest(f"lora.rank: {payload.lora.rank} is not within 1 to {state.config.max_lora_rank}")
    owner = Owner(
        model_id=model_id,
        tenant=job.job.tenant,
        session_id=payload.session_id,
        spec=payload.lora,
        user_metadata=payload.user_metadata,
    )
    state.models[model_id] = new_adapter(
        owner,
        base_sites=state.base.sites,
        lora_alpha=state.config.lora_alpha,
        engine_seed=state.config.seed,
        device=state.base.device,
    )
    return CreateModelDone(model_id=model_id)
