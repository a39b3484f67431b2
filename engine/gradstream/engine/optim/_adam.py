"""AdamW's arithmetic on fp32 values (Loshchilov and Hutter 2019, algorithm 2), which several optimizers use."""

import torch
from torch.optim.adamw import adamw

from gradstream.engine.optim._base import STATE_DTYPES, StatePart, Step
from gradstream.engine.optim._elements import Values
from gradstream.engine.trained import ParamTensor
from gradstream.shared.wire import OptimizerSpec

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"


def adam_parts(spec: OptimizerSpec, tensors: list[ParamTensor]) -> list[StatePart]:
    """Both moments of these tensors."""
    return [StatePart(name=name, dtype=STATE_DTYPES[spec.dtype], tensors=tensors) for name in (EXP_AVG, EXP_AVG_SQ)]


def adam_update(step: Step, values: Values) -> None:
    """One step of torch.optim.AdamW, in place."""
    adam = step.adam
    adamw(
        [values.weights],
        [values.grad],
        [values.state[EXP_AVG]],
        [values.state[EXP_AVG_SQ]],
        [],
        # The fused kernel counts from what was before, and wants the count beside the weights.
        [torch.tensor(float(step.age - 1), device=values.weights.device)],
        fused=True,
        amsgrad=False,
        beta1=adam.beta1,
        beta2=adam.beta2,
        lr=step.lr,
        weight_decay=adam.weight_decay,
        eps=adam.eps,
        maximize=False,
    )
