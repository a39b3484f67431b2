"""What a loss is, and the table of them.

Legend: T tokens of one job in one row, C candidates (targets) per token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstream.engine.registry import Registry
from gradstream.shared.catalog import LossCard
from gradstream.shared.loss_config import Value

TARGETS = "target_tokens"
# Inputs that switch a token off where they are 0.
SWITCHES = ("weights", "advantages")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossArguments:
    """logprobs_TC: log p of the targets, at least fp32. inputs: the card's float arrays [T, C] in the same dtype.

    held_TC: the same log-probabilities as constants, what a formula writes as sg(p); a loss takes no other way to stop a gradient.
    lengths: tokens of each datum, in order; they sum to T. params: every parameter of the card, defaults filled in.
    """

    logprobs_TC: Tensor
    held_TC: Tensor
    inputs: Mapping[str, Tensor]
    params: Mapping[str, Value]
    lengths: list[int]

    def number(self, name: str) -> float:
        """A parameter that is always a number."""
        value = self.params[name]
        assert isinstance(value, float | int), name
        return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """compute gives each token's part of the loss, [T, C]; the loss is their plain sum.

    A token that is switched off (see SWITCHES) must give exactly 0 with gradient 0, whatever its log-probability is: passes leave out
    what the gradients of such tokens alone would need.
    measure gives the card's metrics over all tokens of a job, or nothing where there is nothing to measure.
    """

    card: LossCard
    compute: Callable[[LossArguments], Tensor]
    measure: Callable[[LossArguments], dict[str, float]] | None = None


LOSSES: Registry[str, Loss] = Registry("loss")
# Losses that clients know and that are not had here: the sentence that says so and what to use.
REFUSED: Registry[str, str] = Registry("refused loss")


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
                logprobs_TC=leaf_TC,
                held_TC=arguments.held_TC,
                inputs=arguments.inputs,
                params=arguments.params,
                lengths=arguments.lengths,
            )
        )
    if not with_grad or not elementwise_TC.requires_grad:
        return LossResult(elementwise_TC.detach(), torch.zeros_like(leaf_TC) if with_grad else None)
    (grad_TC,) = torch.autograd.grad(elementwise_TC, leaf_TC, torch.ones_like(elementwise_TC))
    return LossResult(elementwise_TC.detach(), grad_TC)
