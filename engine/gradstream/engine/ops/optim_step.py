"""One optimizer update of each of some models."""

from collections.abc import Sequence

from gradstream.engine.adapters.adapter import Adapter
from gradstream.engine.adapters.merging import Merge, check_rank, coming_merge, is_due
from gradstream.engine.memory import memory_as_failure
from gradstream.engine.models.full import FullModel
from gradstream.engine.ops.registry import OPS, OpJob, each
from gradstream.engine.optim.together import can_be_together, most_numbers, update_together
from gradstream.engine.optim.update import StepFacts, update
from gradstream.engine.state import EngineState
from gradstream.shared.errors import GradstreamError, OutOfMemory
from gradstream.shared.wire import Failed, OptimStep, OptimStepDone, Outcome

_SMALLER = "start the server with a smaller max_merged_lora_rank, max_active_adapters or max_lora_rank"


@OPS.register(OptimStep)
def optim_step(state: EngineState, jobs: Sequence[OpJob[OptimStep]]) -> list[Outcome]:
    """Serve the jobs, which are of different models: those of small adapters that learn alike together, the others one by one."""
    found = _to_be_together(state, jobs)
    outcomes = _together(state, [jobs[number] for number in found])
    if outcomes is None:
        return _alone(state, jobs)
    alone = [number for number in range(len(jobs)) if number not in found]
    by_number = dict(zip(found, outcomes, strict=True))
    by_number |= zip(alone, _alone(state, [jobs[number] for number in alone]), strict=True)
    return [by_number[number] for number in range(len(jobs))]


def _to_be_together(state: EngineState, jobs: Sequence[OpJob[OptimStep]]) -> list[int]:
    """The jobs, by number, of adapters whose updates can be made by common calls; none where there is only one.

    Models too large for what is left of the room are passed over, wherever they rest.
    """
    left_numbers = most_numbers(state.base.device)
    if left_numbers == 0 or state.config.merging.interval:
        return []
    found: list[int] = []
    for number, job in enumerate(jobs):
        try:
            num_numbers = state.held(job.job).layout.num_params
            if num_numbers > left_numbers:
                continue
            model = state.model(job.job)
        except GradstreamError:
            # Told when it is served alone.
            continue
        if isinstance(model, Adapter) and can_be_together(model):
            found.append(number)
            left_numbers -= num_numbers
    return found if len(found) > 1 else []


def _together(state: EngineState, jobs: Sequence[OpJob[OptimStep]]) -> list[Outcome] | None:
    """None when there is no room for it; all models are then as they were."""
    try:
        results = update_together(
            [(state.adapter(job.job), job.payload.adam) for job in jobs],
            seed=state.config.seed,
            schedule=state.config.schedule,
            compute_dtype=state.base.compute_dtype,
            computing=memory_as_failure(state.comm, what="optim_step"),
        )
    except OutOfMemory:
        return None
    return [
        Failed.of(one) if isinstance(one, GradstreamError) else OptimStepDone(metrics=_metrics(one)) for one in results
    ]


def _metrics(facts: StepFacts) -> dict[str, float]:
    return {"grad_norm": facts.grad_norm, "lr": facts.lr, "step": float(facts.number)}


@each
def _alone(state: EngineState, job: OpJob[OptimStep]) -> OptimStepDone:
    """Apply the accumulated gradient and clear it; where the config says so, merge the adapter then.

    Metrics: grad_norm (before clipping), lr (after the schedule), step; merges so far, where adapters are merged. Raises UnknownModel,
    InvalidRequest (hyper-parameters; a merge beyond the highest rank), NonFinite, OutOfMemory, with the model as it was.
    """
    model = state.model(job.job)
    merge = _coming_merge(state, model)
    facts = state.with_room(
        lambda: update(
            model,
            job.payload.adam,
            seed=state.config.seed,
            schedule=state.config.schedule,
            compute_dtype=state.base.compute_dtype,
            computing=memory_as_failure(state.comm, what="optim_step"),
        )
    )
    if merge is not None:
        merge.make()
    metrics = _metrics(facts)
    if isinstance(model, Adapter) and state.config.merging.interval:
        metrics["merges"] = float(model.num_merges)
    return OptimStepDone(metrics=metrics)


def _coming_merge(state: EngineState, model: Adapter | FullModel) -> Merge | None:
    """What this update is followed by; collective where it is a merge."""
    merging = state.config.merging
    if not isinstance(model, Adapter) or not is_due(model, merging):
        return None
    check_rank(model, merging)

    def make() -> Merge:
        with memory_as_failure(state.comm, what="optim_step", help_=_SMALLER):
            return coming_merge(model, resets_optimizer=merging.resets_optimizer)

    return state.with_room(make)
