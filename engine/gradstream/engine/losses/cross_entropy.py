"""Weighted negative log-likelihood, summed over tokens; with several targets per token, soft targets (distillation).

    loss = -sum w p

p: log-probability of the target. A token with weight 0 is switched off.

Inputs: target_tokens int64 [T] or [T, K]; weights w, float32 of the same shape, any real numbers (1.0 if absent).
Parameters: none.
Source: the tinker documentation's cross_entropy. Custom losses of the SDK run on it with weights = -dL/dp.
"""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, Loss, LossArguments
from gradstream.engine.losses._policy import TARGET_INPUT
from gradstream.shared.catalog import LossCard, LossInput

WEIGHTS_INPUT = LossInput(name="weights", dtype="float32", required=False, default=1.0)
MAX_CANDIDATES = 1024


def weighted_nll(arguments: LossArguments) -> Tensor:
    """-w p, [T, C]; exactly 0 where w is 0."""
    weights_TC = arguments.inputs["weights"]
    terms_TC = -weights_TC * arguments.logprobs_TC
    return torch.where(weights_TC != 0, terms_TC, torch.zeros_like(terms_TC))


LOSSES.register("cross_entropy")(
    Loss(
        card=LossCard(name="cross_entropy", inputs=[TARGET_INPUT, WEIGHTS_INPUT], max_candidates=MAX_CANDIDATES),
        compute=weighted_nll,
    )
)
