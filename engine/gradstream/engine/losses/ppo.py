"""Clipped policy gradient (Schulman et al. 2017, equation 7), as a sum."""

import torch
from torch import Tensor

from gradstream.engine.losses._base import (
    LOSSES,
    POLICY_INPUTS,
    Loss,
    LossArguments,
    clip_params,
    policy_difference,
)
from gradstream.shared.catalog import LossCard


def _compute(arguments: LossArguments) -> Tensor:
    """-min(r A, clip(r, low, high) A) with r = exp(p - q); the thresholds are bounds of r itself."""
    advantages_TC = arguments.inputs["advantages"]
    ratio_TC = policy_difference(arguments).exp()
    clipped_TC = ratio_TC.clamp(arguments.params["clip_low_threshold"], arguments.params["clip_high_threshold"])
    return -torch.minimum(ratio_TC * advantages_TC, clipped_TC * advantages_TC)


LOSSES.register("ppo")(
    Loss(card=LossCard(name="ppo", inputs=POLICY_INPUTS, params=clip_params(low=0.8, high=1.2)), compute=_compute)
)
