"""Updates of several small models at once: each operation is one call for all of them, with the bits that each gets by itself.

An update treats each number for itself, so a model's numbers do not depend on which models are beside it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gradstream.engine.optim._adam import EXP_AVG, EXP_AVG_SQ
from gradstream.engine.optim._base import Step
from gradstream.engine.optim.schedule import Schedule
from gradstream.engine.optim.update import StepFacts, finished, norms, not_finite, planned
from gradstream.engine.trained import TrainedModel
from gradstream.shared.errors import GradstreamError, NonFinite
from gradstream.shared.hyperparameters import check_adam
from gradstream.shared.wire import AdamParams

# Of all models together; copies take 16 bytes a number.
_GPU_NUMBERS = 1 << 25
# Beyond it a model at a time is faster on a CPU, since it stays in the caches; below it the number of calls counts.
_CPU_NUMBERS = 1 << 21


def most_numbers(device: torch.device) -> int:
    """How many numbers models that are updated together may have, all in all. On GPUs launches and looks at the device count too."""
    return _CPU_NUMBERS if device.type == "cpu" else _GPU_NUMBERS


def can_be_together(model: TrainedModel) -> bool:
    """True for models that learn by AdamW with all their tensors in float32."""
    is_float = all(tensor.dtype == torch.float32 for tensor in (model.weights, *model.optim.values()))
    return model.optimizer.type == "adamw" and is_float


@torch.no_grad()
def update_together(
    wanted: Sequence[tuple[TrainedModel, AdamParams]],
    *,
    seed: int,
    schedule: Schedule | None,
    compute_dtype: torch.dtype,
    computing: AbstractContextManager[None],
) -> list[StepFacts | GradstreamError]:
    """`update` of each of these different models, which `can_be_together`; the error in the place of what it raises.

    computing: entered while nothing is stored yet; what it raises is raised, with all models as they were.
    """
    if not wanted:
        return []
    results: dict[int, StepFacts | GradstreamError] = {}
    steps: dict[int, Step] = {}
    found = norms([model.grad for model, _ in wanted])
    for number, ((model, adam), norm) in enumerate(zip(wanted, found, strict=True)):
        try:
            check_adam(adam)
            steps[number] = planned(model, adam, norm=norm, seed=seed, schedule=schedule)
        except GradstreamError as error:
            results[number] = error
    if steps:
        made = _make(list(steps.values()), compute_dtype, computing)
        results |= zip(steps, made, strict=True)
    return [results[number] for number in range(len(wanted))]


def _make(
    steps: Sequence[Step], compute_dtype: torch.dtype, computing: AbstractContextManager[None]
) -> list[StepFacts | NonFinite]:
    places = [[step.model.weights, step.model.optim[EXP_AVG], step.model.optim[EXP_AVG_SQ]] for step in steps]
    with computing:
        divisors = [float(step.divisor) for step in steps]
        grads = torch._foreach_div([step.model.grad for step in steps], divisors)  # noqa: SLF001 (no public name)
        torch._foreach_mul_(grads, [step.clip for step in steps])
        values = [[tensor.clone() for tensor in own] for own in places]
        for numbers in _alike(steps):
            _adamw([steps[n] for n in numbers], [values[n] for n in numbers], [grads[n] for n in numbers])
        verdicts = _fit(values, compute_dtype)
    good = [number for number, is_good in enumerate(verdicts) if is_good]
    if good:
        targets = [tensor for number in good for tensor in places[number]]
        torch._foreach_copy_(targets, [tensor for number in good for tensor in values[number]])
    return [finished(step) if is_good else not_finite(step) for step, is_good in zip(steps, verdicts, strict=True)]


def _alike(steps: Sequence[Step]) -> list[list[int]]:
    """The numbers of the steps with the same hyper-parameters, in groups."""
    groups: dict[tuple[float, AdamParams], list[int]] = {}
    for number, step in enumerate(steps):
        groups.setdefault((step.lr, step.adam), []).append(number)
    return list(groups.values())


def _adamw(steps: Sequence[Step], values: Sequence[list[Tensor]], grads: Sequence[Tensor]) -> None:
    """As `adam_update`, for models with the same hyper-parameters."""
    adam = steps[0].adam
    weights, exp_avgs, exp_avg_sqs = (list(own) for own in zip(*values, strict=True))
    torch._fused_adamw_(
        weights,
        list(grads),
        exp_avgs,
        exp_avg_sqs,
        [],
        # The kernel takes the count of this update.
        [torch.tensor(float(step.age), device=weights[0].device) for step in steps],
        amsgrad=False,
        lr=steps[0].lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )


def _fit(values: Sequence[list[Tensor]], compute_dtype: torch.dtype) -> list[bool]:
    """For each model: no number of it is nan or inf, nor a weight once it is rounded to compute_dtype. One look at the device.

    values: weights and state of each, float32. As `finite.fits`, with one stack of the extremes of all.
    """
    extremes = torch.stack([end for own in values for tensor in own for end in torch.aminmax(tensor)])
    by_model = extremes.view(len(values), -1)
    are_finite = by_model.isfinite().all(dim=1)
    if compute_dtype.itemsize < extremes.element_size():
        are_finite &= by_model[:, :2].to(compute_dtype).isfinite().all(dim=1)
    verdicts: list[bool] = are_finite.tolist()
    return verdicts
