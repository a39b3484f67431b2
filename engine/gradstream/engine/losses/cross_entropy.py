"""Weighted negative log-likelihood, summed over tokens."""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, TARGET_INPUT, Loss, LossArguments
from gradstream.shared.catalog import LossCard, LossInput


def _compute(arguments: LossArguments) -> Tensor:
    """-w * log p. Weights are any real numbers; with C targets per token they are soft targets."""
    weights_TC = arguments.inputs["weights"]
    terms_TC = -weights_TC * arguments.logprobs_TC
    return torch.where(weights_TC != 0, terms_TC, torch.zeros_like(terms_TC))


LOSSES.register("cross_entropy")(
    Loss(
        card=LossCard(
            name="cross_entropy",
            inputs=[TARGET_INPUT, LossInput(name="weights", dtype="float32", required=False, default=1.0)],
        ),
        compute=_compute,
    )
)
