"""A fresh model: an adapter on the base model, or the base model's own weights to train."""

from dataclasses import replace

from gradstream.engine.adapters.adapter import Adapter, new_adapter
from gradstream.engine.adapters.layout import with_modules
from gradstream.engine.checkpoint.begin import begin
from gradstream.engine.checkpoint.location import CheckpointKind, checkpoint
from gradstream.engine.checkpoint.save import SaveOrder
from gradstream.engine.checkpoint.shared import save
from gradstream.engine.memory import room_for_adapter
from gradstream.engine.models.full import FullModel
from gradstream.engine.models.reread import reread
from gradstream.engine.numerics import master_dtype
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.optim.state import check_optimizer
from gradstream.engine.state import EngineState
from gradstream.engine.trained import Owner, Training
from gradstream.shared.errors import CheckpointExists, InvalidRequest, StorageFailure, StorageLimit, Unsupported
from gradstream.shared.hyperparameters import check_alpha
from gradstream.shared.ids import DEFAULT_MODEL, ModelId
from gradstream.shared.wire import CreateModel, CreateModelDone, LoraSpec


@OPS.register(CreateModel)
@each
def create_model(state: EngineState, job: OpJob[CreateModel]) -> CreateModelDone:
    """Make the model; collective where weights have to be read again.

    Raises InvalidRequest for another base model, a rank or alpha out of bounds, nothing to train, an optimizer that cannot
    be, a taken id, a second full-weight model, or a checkpoint to start from that does not fit; Unsupported for the kind of model that
    this engine does not train; OutOfMemory; StorageFailure when weights cannot be read, or with StorageLimit when the first checkpoint cannot be
    written.
    """
    model_id = ModelId(job.job.owner)
    payload = job.payload
    if model_id in state.models:
        raise InvalidRequest(f"model {model_id} exists already")
    names = (state.config.model_name, *state.config.model_aliases)
    if payload.base_model not in names:
        raise InvalidRequest(f"base_model: {payload.base_model!r} is not served here; use {' or '.join(names)}")
    owner = Owner(
        model_id=model_id,
        tenant=job.job.tenant,
        session_id=payload.session_id,
        spec=payload.lora,
        user_metadata=payload.user_metadata,
    )
    model = _adapter(state, owner, payload) if state.config.is_lora else _full(state, owner, payload)
    begin(state, model, with_optimizer=True)
    path = None if payload.save_as is None else _save(state, model, job, payload.save_as)
    state.models[model_id] = model
    return CreateModelDone(model_id=model_id, path=path)


def _save(state: EngineState, model: Adapter | FullModel, job: OpJob[CreateModel], name: str) -> str | None:
    """The checkpoint of the untrained model; None when one of that name lies there, which a client may have saved."""
    location = checkpoint(model.model_id, CheckpointKind.WEIGHTS, name)
    order = SaveOrder(location=location, job=job.job.future_id, base_model=state.config.model_name)
    try:
        save(state, model, order)
    except CheckpointExists:
        return None
    except (StorageLimit, StorageFailure) as error:
        what = f"create_model: the model's first checkpoint could not be written: {error.message}"
        raise type(error)(f"{what} (skip_initial_checkpoint: true makes none)") from error
    state.samplers.drop(location.uri())
    return location.uri()


def _adapter(state: EngineState, owner: Owner, payload: CreateModel) -> Adapter:
    if owner.spec is None:
        raise Unsupported(
            "create_model: this server trains LoRA adapters; name lora_config.rank. For training of the full weights it must be "
            "started with enable_lora: false"
        )
    _check_spec(state, owner.spec)
    spec = with_modules(state.base.sites, owner.spec, state.config.lora_target_modules)
    training = _training(state, payload)
    state.models.make_room()

    def make() -> Adapter:
        with room_for_adapter(state.comm, what="create_model"):
            return new_adapter(
                replace(owner, spec=spec),
                base_sites=state.base.sites,
                lora_alpha=state.config.lora_alpha,
                engine_seed=state.config.seed,
                device=state.base.device,
                training=training,
            )

    return state.with_room(make)


def _check_spec(state: EngineState, spec: LoraSpec) -> None:
    if not 1 <= spec.rank <= state.config.max_lora_rank:
        raise InvalidRequest(f"lora.rank: {spec.rank} is not within 1 to {state.config.max_lora_rank}")
    if spec.alpha is not None:
        check_alpha(spec.alpha, rank=spec.rank, field="lora.alpha")
    merging = state.config.merging
    if merging.interval and 2 * spec.rank > merging.max_rank:
        raise InvalidRequest(
            f"lora.rank: {spec.rank} has no room for a merge, which makes it {2 * spec.rank} (merge_lora_interval: {merging.interval}, "
            f"max_merged_lora_rank: {merging.max_rank}); use {merging.max_rank // 2} or less"
        )


def _full(state: EngineState, owner: Owner, payload: CreateModel) -> FullModel:
    if owner.spec is not None:
        raise Unsupported(
            f"create_model: this server trains the full weights of its model; use model {DEFAULT_MODEL!r}, without lora_config. For "
            "LoRA adapters it must be started with enable_lora: true"
        )
    if state.models:
        raise InvalidRequest(
            "create_model: this server trains the full weights of its model, so it holds one model at a time, and one is there "
            "already; unload that one first"
        )
    training = _training(state, payload)
    state.flat.move(state.flat.device)
    # A checkpoint to start from fills all of it.
    if state.start is None and not state.flat.is_fresh:
        reread(state)
    return FullModel(
        owner=owner, flat=state.flat, master_dtype=master_dtype(state.config, state.base), training=training
    )


def _training(state: EngineState, payload: CreateModel) -> Training:
    """How the model learns; raises InvalidRequest when its optimizer cannot be had."""
    optimizer = state.config.optimizer if payload.optimizer is None else payload.optimizer
    check_optimizer(optimizer)
    return Training(optimizer=optimizer, reduction=payload.reduction)
