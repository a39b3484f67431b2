"""Negative log-likelihood token by token: the name under which xorl's documents ask for per-token outputs.

    loss = -sum w p

p: log-probability of the target. A token with weight 0 is switched off.

Inputs: target_tokens int64 [T]; weights w, float32 [T] (1.0 if absent).
Parameters: none.
Source: xorl's documents; no version of its server has it. Log-probabilities and elementwise losses come back from every loss here.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import TARGET_INPUT
from gradstream.engine.losses.cross_entropy import WEIGHTS_INPUT, weighted_nll
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    return weighted_nll(arguments)


LOSSES.register("per_token_ce")(
    Loss(card=LossCard(name="per_token_ce", inputs=[TARGET_INPUT, WEIGHTS_INPUT]), compute=_compute)
)
