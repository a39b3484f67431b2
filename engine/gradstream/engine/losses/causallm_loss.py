"""Negative log-likelihood of the next token, summed: xorl's name for cross_entropy with one target per token.

    loss = -sum w p

p: log-probability of the target. A token with weight 0 is switched off.

Inputs: target_tokens int64 [T]; weights w, float32 [T] (1.0 if absent).
Parameters: none.
Source: xorl's causallm_loss. There weights are 0 or 1; here any real number, as in cross_entropy.
"""

from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import TARGET_INPUT
from gradstream.engine.losses.cross_entropy import WEIGHTS_INPUT, weighted_nll
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    return weighted_nll(arguments)


LOSSES.register("causallm_loss")(
    Loss(card=LossCard(name="causallm_loss", inputs=[TARGET_INPUT, WEIGHTS_INPUT]), compute=_compute)
)
