"""One optimizer update of one model."""

from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.optim.adamw import adamw_step, check_adam
from gradstream.engine.state import EngineState
from gradstream.shared.wire import OptimStep, OptimStepDone


@OPS.register(OptimStep)
@each
def optim_step(state: EngineState, job: OpJob[OptimStep]) -> OptimStepDone:
    """Apply the accumulated gradient and clear it.

    Metrics: grad_norm (before clipping), lr, step. Raises UnknownModel, InvalidRequest (hyper-parameters), NonFinite.
    """
    adapter = state.model(job.job)
    adam = job.payload.adam
    check_adam(adam)
    facts = adamw_step(adapter, adam)
    metrics = {"grad_norm": facts.grad_norm, "lr": adam.learning_rate, "step": float(facts.step)}
    return OptimStepDone(metrics=metrics)
