"""Losses of tokens that have a target; the others are left out before a loss sees them.

Legend: T tokens of one job in one row, N those with a target, C candidates (targets) per token.
"""

from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstream.engine.losses._base import Loss, LossArguments, LossResult, evaluate
from gradstream.engine.transfer import to_device

# Which of the T tokens have a target; None: all.
Valid = NDArray[np.bool_] | None


def evaluate_valid(loss: Loss, arguments: LossArguments, is_valid_T: Valid, *, with_grad: bool) -> LossResult:
    """The loss of the tokens with a target; values and gradient are exactly 0 at the others."""
    if is_valid_T is None or is_valid_T.all():
        return evaluate(loss, arguments, with_grad=with_grad)
    zeros_TC = torch.zeros_like(arguments.logprobs_TC)
    if not is_valid_T.any():
        return LossResult(zeros_TC, zeros_TC.clone() if with_grad else None)
    index_N = _index(is_valid_T, arguments.logprobs_TC)
    result = evaluate(loss, _picked(arguments, is_valid_T, index_N), with_grad=with_grad)
    grad_TC = None if result.grad_TC is None else zeros_TC.index_copy(0, index_N, result.grad_TC)
    return LossResult(zeros_TC.index_copy(0, index_N, result.elementwise_TC), grad_TC)


def measure_valid(loss: Loss, arguments: LossArguments, is_valid_T: Valid) -> dict[str, float]:
    """The card's metrics over the tokens with a target; nothing where there is none."""
    if loss.measure is None or (is_valid_T is not None and not is_valid_T.any()):
        return {}
    if is_valid_T is None or is_valid_T.all():
        return loss.measure(arguments)
    return loss.measure(_picked(arguments, is_valid_T, _index(is_valid_T, arguments.logprobs_TC)))


def _index(is_valid_T: NDArray[np.bool_], like: Tensor) -> Tensor:
    return to_device(np.flatnonzero(is_valid_T), like.device)


def _picked(arguments: LossArguments, is_valid_T: NDArray[np.bool_], index_N: Tensor) -> LossArguments:
    """The arguments of the tokens with a target alone, as if there were no others; a datum without any is gone."""
    ends = list(accumulate(arguments.lengths))
    counts = [int(is_valid_T[end - length : end].sum()) for end, length in zip(ends, arguments.lengths, strict=True)]
    logprobs_NC = arguments.logprobs_TC.index_select(0, index_N)
    held_NC = logprobs_NC
    if arguments.held_TC is not arguments.logprobs_TC:
        held_NC = arguments.held_TC.index_select(0, index_N)
    return LossArguments(
        logprobs_TC=logprobs_NC,
        held_TC=held_NC,
        inputs={name: values_TC.index_select(0, index_N) for name, values_TC in arguments.inputs.items()},
        params=arguments.params,
        lengths=[count for count in counts if count],
    )
