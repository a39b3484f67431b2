"""AdamW with decoupled weight decay on an adapter's flat tensors (Loshchilov and Hutter 2019, algorithm 2)."""

import math
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

from gradstream.engine.optim._base import OPTIMIZERS, STATE_DTYPES, Optimizer, StatePart
from gradstream.engine.trained import TrainedLayout, TrainedModel
from gradstream.shared.errors import InvalidRequest, NonFinite
from gradstream.shared.wire import AdamParams, OptimizerSpec

# As in torch.nn.utils.clip_grad_norm_.
_CLIP_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """grad_norm: the global L2 norm before clipping. step: the number of this update, from 1."""

    grad_norm: float
    step: int


def check_adam(adam: AdamParams) -> None:
    """Raise InvalidRequest, naming the field, when a hyper-parameter is out of its range."""
    for name, value in (
        ("learning_rate", adam.learning_rate),
        ("eps", adam.eps),
        ("weight_decay", adam.weight_decay),
        ("grad_clip_norm", adam.grad_clip_norm),
    ):
        if not math.isfinite(value) or value < 0:
            raise InvalidRequest(f"adam_params.{name}: {value} must be a finite number, 0 or more")
    for name, value in (("beta1", adam.beta1), ("beta2", adam.beta2)):
        if not 0 <= value < 1:
            raise InvalidRequest(f"adam_params.{name}: {value} must be at least 0 and below 1")


@torch.no_grad()
def adamw_step(adapter: TrainedModel, adam: AdamParams) -> StepFacts:
    """Apply the accumulated gradient once and clear it; the arithmetic is torch.optim.AdamW's, in fp32.

    Without an accumulated gradient this is a step with gradient zero: moments and weights decay. grad_clip_norm 0 means no
    clipping. Raises NonFinite, with the adapter as it was, when the norm or an updated value is not finite.
    """
    grad_norm = float(torch.linalg.vector_norm(adapter.grad, dtype=torch.float64))
    if not math.isfinite(grad_norm):
        raise NonFinite(f"the gradient norm of model {adapter.model_id} is {grad_norm}; no step was made")
    grad = adapter.grad
    if adam.grad_clip_norm > 0:
        grad = grad * min(1.0, adam.grad_clip_norm / (grad_norm + _CLIP_EPS))
    exp_avg, exp_avg_sq = adapter.optim["exp_avg"], adapter.optim["exp_avg_sq"]
    state = (adapter.weights, exp_avg, exp_avg_sq)
    before = [tensor.clone() for tensor in state]
    adamw(
        [adapter.weights],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.tensor(float(adapter.step), device=_step_device(adapter))],
        fused=True,
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=adam.learning_rate,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        maximize=False,
    )
    if not all(bool(tensor.isfinite().all()) for tensor in state):
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(old)
        raise NonFinite(
            f"step {adapter.step + 1} of model {adapter.model_id} would make weights or moments nan or inf "
            f"(learning_rate {adam.learning_rate}, eps {adam.eps}, gradient norm {grad_norm:.3g}); no step was made"
        )
    adapter.step += 1
    adapter.clear_grad()
    return StepFacts(grad_norm=grad_norm, step=adapter.step)


def _step_device(adapter: TrainedModel) -> torch.device:
    """The fused kernel wants the step count beside the weights."""
    return adapter.weights.device


def _parts(spec: OptimizerSpec, layout: TrainedLayout, _: torch.dtype) -> list[StatePart]:
    dtype = STATE_DTYPES[spec.dtype]
    return [StatePart(name=name, dtype=dtype, tensors=layout.tensors) for name in ("exp_avg", "exp_avg_sq")]


OPTIMIZERS.register("adamw")(Optimizer(parts=_parts))
