"""One optimizer update of one model."""

from gradstream.engine.memory import memory_as_failure
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.optim.update import update
from gradstream.engine.state import EngineState
from gradstream.shared.wire import OptimStep, OptimStepDone


@OPS.register(OptimStep)
@each
def optim_step(state: EngineState, job: OpJob[OptimStep]) -> OptimStepDone:
    """Apply the accumulated gradient and clear it.

    Metrics: grad_norm (before clipping), lr (after the schedule), step. Raises UnknownModel, InvalidRequest (hyper-parameters),
    NonFinite, OutOfMemory.
    """
    facts = update(
        state.model(job.job),
        job.payload.adam,
        seed=state.config.seed,
        schedule=state.config.schedule,
        compute_dtype=state.base.compute_dtype,
        computing=memory_as_failure(state.comm, what="optim_step"),
    )
    return OptimStepDone(metrics={"grad_norm": facts.grad_norm, "lr": facts.lr, "step": float(facts.number)})
