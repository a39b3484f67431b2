"""A model begins again: its optimizer, and its weights if that is asked for."""

from gradstream.engine.adapters.adapter import Adapter, scale_of
from gradstream.engine.adapters.factors import Factors
from gradstream.engine.adapters.initial import initial_weights
from gradstream.engine.checkpoint.begin import begin
from gradstream.engine.models.full import FullModel
from gradstream.engine.models.reread import reread
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.state import EngineState
from gradstream.shared.wire import ResetModel, ResetModelDone


@OPS.register(ResetModel)
@each
def reset_model(state: EngineState, job: OpJob[ResetModel]) -> ResetModelDone:
    """Clear the optimizer's state, the step and the accumulated gradient; with weights, put back those of the model's creation.

    Collective where weights are read. Raises UnknownModel, InvalidRequest (asleep), StorageFailure, with the model as it was.
    """
    model = state.model(job.job)
    if job.payload.weights and not begin(state, model, with_optimizer=False):
        _begin_again(state, model)
    for tensor in model.optim.values():
        tensor.zero_()
    model.step = 0
    model.optim_began = 0
    model.clear_grad()
    return ResetModelDone(model_id=model.model_id)


def _begin_again(state: EngineState, model: Adapter | FullModel) -> None:
    """The base model's weights; or those of a fresh adapter of this spec, with nothing merged, and its scale."""
    if isinstance(model, FullModel):
        reread(state)
        model.take_flat()
        state.flat.is_fresh = False
        return
    spec = model.spec
    assert spec.seed is not None, "an adapter's spec has its seed resolved"
    model.take(Factors(model.layout, initial_weights(model.layout, seed=spec.seed)))
    model.scale = scale_of(spec, lora_alpha=state.config.lora_alpha)
