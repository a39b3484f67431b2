"""Policy gradient with the ratio to the sampling policy."""

import torch
from torch import Tensor

from gradstream.engine.losses._base import LOSSES, TARGET_INPUT, Loss, LossArguments
from gradstream.shared.catalog import LossCard, LossInput


def _compute(arguments: LossArguments) -> Tensor:
    """-r * A with r = exp(p - q): p the model's log-probability, q the sampler's, A the advantage."""
    advantages_TC = arguments.inputs["advantages"]
    is_on_TC = advantages_TC != 0
    difference_TC = arguments.logprobs_TC - arguments.inputs["logprobs"]
    # Replaced before exp: the derivative of a discarded inf would be nan.
    ratio_TC = torch.where(is_on_TC, difference_TC, torch.zeros_like(difference_TC)).exp()
    return -ratio_TC * advantages_TC


LOSSES.register("importance_sampling")(
    Loss(
        card=LossCard(
            name="importance_sampling",
            inputs=[
                TARGET_INPUT,
                LossInput(name="logprobs", dtype="float32"),
                LossInput(name="advantages", dtype="float32"),
            ],
        ),
        compute=_compute,
    )
)
