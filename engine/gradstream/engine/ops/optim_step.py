"""One optimizer update of one model."""

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.merging import Merge, check_rank, coming_merge, is_due
from gradstream.engine.memory import memory_as_failure
from gradstream.engine.models.full import FullModel
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.optim.update import update
from gradstream.engine.state import EngineState
from gradstream.shared.wire import OptimStep, OptimStepDone

_SMALLER = "start the server with a smaller max_merged_lora_rank, max_active_adapters or max_lora_rank"


@OPS.register(OptimStep)
@each
def optim_step(state: EngineState, job: OpJob[OptimStep]) -> OptimStepDone:
    """Apply the accumulated gradient and clear it; where the config says so, merge the adapter then.

    Metrics: grad_norm (before clipping), lr (after the schedule), step; merges so far, where adapters are merged. Raises UnknownModel,
    InvalidRequest (hyper-parameters; a merge beyond the highest rank), NonFinite, OutOfMemory, with the model as it was.
    """
    model = state.model(job.job)
    merge = _coming_merge(state, model)
    facts = update(
        model,
        job.payload.adam,
        seed=state.config.seed,
        schedule=state.config.schedule,
        compute_dtype=state.base.compute_dtype,
        computing=memory_as_failure(state.comm, what="optim_step"),
    )
    if merge is not None:
        merge.make()
    metrics = {"grad_norm": facts.grad_norm, "lr": facts.lr, "step": float(facts.number)}
    if isinstance(model, Adapter) and state.config.merging.interval:
        metrics["merges"] = float(model.num_merges)
    return OptimStepDone(metrics=metrics)


def _coming_merge(state: EngineState, model: Adapter | FullModel) -> Merge | None:
    """What this update is followed by; collective where it is a merge."""
    merging = state.config.merging
    if not isinstance(model, Adapter) or not is_due(model, merging):
        return None
    check_rank(model, merging)
    with memory_as_failure(state.comm, what="optim_step", help_=_SMALLER):
        return coming_merge(model, resets_optimizer=merging.resets_optimizer)
