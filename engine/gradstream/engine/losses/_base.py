"""What a loss is, and the table of them.

Legend: T tokens of one job in one row, C candidates (targets) per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.registry import Registry
from gradstream.shared.catalog import LossCard, LossInput, LossParam

TARGETS = "target_tokens"
TARGET_INPUT = LossInput(name=TARGETS, dtype="int64")
# q, the sampling policy's log-probabilities, and A, the advantages; a token with advantage 0 is switched off.
POLICY_INPUTS = [
    TARGET_INPUT,
    LossInput(name="logprobs", dtype="float32"),
    LossInput(name="advantages", dtype="float32"),
]


def clip_params(*, low: float, high: float) -> list[LossParam]:
    """Bounds of the probability ratio, with their defaults."""
    return [
        LossParam(name="clip_low_threshold", default=low, minimum=0.0),
        LossParam(name="clip_high_threshold", default=high, minimum=0.0),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossArguments:
    """logprobs_TC: log p of the targets, at least fp32. inputs: the card's float arrays [T, C] in the same dtype.

    lengths: tokens of each datum, in order; they sum to T. params: every parameter of the card, defaults filled in.
    """

    logprobs_TC: Tensor
    inputs: Mapping[str, Tensor]
    params: Mapping[str, float]
    lengths: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """compute gives each token's part of the loss, [T, C]; the loss is their plain sum.

    A token that is switched off (weight or advantage 0) must give exactly 0 with gradient 0, whatever its log-probability is.
    """

    card: LossCard
    compute: Callable[[LossArguments], Tensor]


LOSSES: Registry[str, Loss] = Registry("loss")


def policy_difference(arguments: LossArguments) -> Tensor:
    """p - q, [T, C], and 0 where the advantage is 0: replaced before any exp, since the derivative of a discarded inf is nan."""
    difference_TC = arguments.logprobs_TC - arguments.inputs["logprobs"]
    is_on_TC = arguments.inputs["advantages"] != 0
    return torch.where(is_on_TC, difference_TC, torch.zeros_like(difference_TC))


@dataclass(frozen=True, slots=True)
class LossResult:
    """elementwise_TC: each token's part of the loss. grad_TC: its derivative by the log-probability."""

    elementwise_TC: Tensor
    grad_TC: Tensor | None


def evaluate(loss: Loss, arguments: LossArguments, *, with_grad: bool) -> LossResult:
    """The loss's values, and its gradient if asked for."""
    leaf_TC = arguments.logprobs_TC.detach().requires_grad_(with_grad)
    with torch.set_grad_enabled(with_grad):
        elementwise_TC = loss.compute(
            LossArguments(
                logprobs_TC=leaf_TC, inputs=arguments.inputs, params=arguments.params, lengths=arguments.lengths
            )
        )
    if not with_grad or not elementwise_TC.requires_grad:
        return LossResult(elementwise_TC.detach(), torch.zeros_like(leaf_TC) if with_grad else None)
    (grad_TC,) = torch.autograd.grad(elementwise_TC, leaf_TC, torch.ones_like(elementwise_TC))
    return LossResult(elementwise_TC.detach(), grad_TC)
